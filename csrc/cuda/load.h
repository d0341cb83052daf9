// Loads rows of a matrix as fp32. The dtype is tested here, at run time, so that every kernel is compiled
// once. This is cheap: all threads take the same branch, and what is loaded is used several times.

#pragma once

#include <bit>
#include <cmath>

#include "core/params.h"
#include "core/widen.h"
#include "cuda/device.h"

namespace cu_fast {

// Whether four neighbours at a multiple of four, in any row, may be read at once.
CU_FAST_DEVICE bool reads_fours(const Matrix& m) {
  const int64_t bytes = m.dtype == Dtype::f32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(m.data) % (4 * bytes) == 0 && m.stride % 4 == 0;
}

// Four neighbours as they are stored. Widening is a separate step, so that many loads can be in flight.
// 16-bit types leave z and w zero. column is a multiple of 4, entries beyond the width are zero; `fours` is
// reads_fours(m).
CU_FAST_DEVICE uint4 load_raw(const Matrix& m, bool fours, int64_t row, int64_t column, int64_t width) {
  const int64_t i = row * m.stride + column;
  if (fours && column + 4 <= width) {
    if (m.dtype == Dtype::f32) return *reinterpret_cast<const uint4*>(static_cast<const float*>(m.data) + i);
    const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(m.data) + i);
    return make_uint4(pairs.x, pairs.y, 0, 0);
  }
  uint32_t raw[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (column + j >= width) continue;
    if (m.dtype == Dtype::f32) {
      raw[j] = static_cast<const uint32_t*>(m.data)[i + j];
    } else {
      raw[j / 2] |= uint32_t{static_cast<const uint16_t*>(m.data)[i + j]} << (16 * (j % 2));
    }
  }
  return make_uint4(raw[0], raw[1], raw[2], raw[3]);
}

CU_FAST_DEVICE float2 widen_pair(uint32_t pair, Dtype dtype) {
  const auto low = static_cast<uint16_t>(pair), high = static_cast<uint16_t>(pair >> 16);
  if (dtype == Dtype::bf16) return make_float2(widen(Bf16{low}), widen(Bf16{high}));
  return make_float2(widen(Half{low}), widen(Half{high}));
}

CU_FAST_DEVICE float4 widen_four(uint4 raw, Dtype dtype) {
  if (dtype == Dtype::f32) {
    return make_float4(std::bit_cast<float>(raw.x), std::bit_cast<float>(raw.y), std::bit_cast<float>(raw.z),
                       std::bit_cast<float>(raw.w));
  }
  const float2 first = widen_pair(raw.x, dtype), second = widen_pair(raw.y, dtype);
  return make_float4(first.x, first.y, second.x, second.y);
}

CU_FAST_DEVICE int32_t wrapping_add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

CU_FAST_DEVICE float& entry(float4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// Neither NaN nor Inf.
CU_FAST_DEVICE bool is_finite(float x) {
  return fabsf(x) <= 3.402823466e38f;
}
CU_FAST_DEVICE bool is_finite(float4 x) {
  return is_finite(x.x) && is_finite(x.y) && is_finite(x.z) && is_finite(x.w);
}

CU_FAST_DEVICE float quiet_nan() {
  return std::bit_cast<float>(0x7fc00000u);
}

// z - pre, rounded, for four neighbours; pre null: z.
CU_FAST_DEVICE float4 load_centred(const Matrix& z, bool fours, const float* pre, int64_t row, int64_t column,
                                   int64_t width) {
  float4 four = widen_four(load_raw(z, fours, row, column, width), z.dtype);
  if (pre == nullptr) return four;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < width) entry(four, i) = add(entry(four, i), -pre[column + i]);
  }
  return four;
}

}  // namespace cu_fast
