// One row of z as integers (core/fixed.h), by a block of kThreads: the largest magnitude, then the digits.

#pragma once

#include "cuda/fixed.h"

namespace cu_fast {

// Sums and maxima over all threads of the block, returned to all of them.
template <class T>
struct BlockShared {
  T of[kWarps];
};

template <class T, class Merge>
CU_FAST_DEVICE T block_merge(T x, BlockShared<T>& shared, const Merge& merge) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = merge(x, shuffle_xor(x, lanes));
  sync_block();  // the previous numbers have been read
  if (lane_index() == 0) shared.of[warp_index()] = x;
  sync_block();
  T merged = shared.of[0];
  for (int w = 1; w < kWarps; ++w) merged = merge(merged, shared.of[w]);
  return merged;
}

template <class T>
CU_FAST_DEVICE T block_sum(T x, BlockShared<T>& shared) {
  return block_merge(x, shared, [](T a, T b) { return a + b; });
}

CU_FAST_DEVICE float block_max(float x, BlockShared<float>& shared) {
  return block_merge(x, shared, [](float a, float b) { return fmaxf(a, b); });
}

// Four neighbours times 2^a, rounded, as one word per digit.
CU_FAST_DEVICE void cut_four(float4 z, float power, uint32_t (&words)[kDigits]) {
#pragma unroll
  for (int i = 0; i < kDigits; ++i) words[i] = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    int8_t digits[kDigits];
    cut_digits(static_cast<int32_t>(rintf(multiply(entry(z, c), power))), digits);
#pragma unroll
    for (int i = 0; i < kDigits; ++i) words[i] |= uint32_t{static_cast<uint8_t>(digits[i])} << (8 * c);
  }
}

// Writes the digits and the unit of a token, and returns the unit to all threads: NaN of a row with NaN or Inf,
// whose digits are zeros. The digits are visible to the block after the next sync_block.
CU_FAST_DEVICE float fix_row(const ScoreParams& p, const FixedRows& rows, int64_t token,
                             BlockShared<float>& shared) {
  const bool fours = reads_fours(p.z);
  float largest = 0;
  for (int64_t e = 4 * thread_index(); e < p.E; e += 4 * kThreads) {
    float4 z = load_centred(p.z, fours, p.pre, token, e, p.E);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      largest = fmaxf(largest, is_finite(entry(z, i)) ? fabsf(entry(z, i)) : INFINITY);
    }
  }
  largest = block_max(largest, shared);
  const bool finite = is_finite(largest);
  const int shift = finite ? shift_of(largest) : 0;
  const float unit = finite ? power_of_two(-shift) : quiet_nan(), power = power_of_two(shift);
  int8_t* const row = rows.row(token);
  for (int64_t e = 4 * thread_index(); e < rows.width; e += 4 * kThreads) {
    float4 z = make_float4(0, 0, 0, 0);
    if (finite && e < p.E) z = load_centred(p.z, fours, p.pre, token, e, p.E);
    uint32_t words[kDigits];
    cut_four(z, power, words);
#pragma unroll
    for (int i = 0; i < kDigits; ++i) *reinterpret_cast<uint32_t*>(row + i * rows.width + e) = words[i];
  }
  if (thread_index() == 0) rows.unit[token] = unit;
  return unit;
}

}  // namespace cu_fast
