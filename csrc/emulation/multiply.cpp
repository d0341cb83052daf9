// The tensor core's product of bytes; the layout of the registers: cuda/device.h.

#include <cstring>

#include "emulation/machine.h"

namespace cu_fast::emulation {
namespace {

constexpr int kRows = 16, kColumns = 8, kDepth = 32;

// The hottest code: vectorised whatever the flags, and not sanitized, because nothing in it can overflow.
#define CU_FAST_HOT __attribute__((optimize("O3"), no_sanitize("undefined", "address")))

template <class A>
CU_FAST_HOT void multiply_any(const A (&a)[kRows][kDepth], const int8_t (&b)[kColumns][kDepth],
                              int32_t (&sums)[kRows][kColumns]) {
  int16_t wide_a[kRows * kDepth], wide_b[kColumns * kDepth];
  for (int i = 0; i < kRows * kDepth; ++i) wide_a[i] = a[i / kDepth][i % kDepth];
  for (int i = 0; i < kColumns * kDepth; ++i) wide_b[i] = b[i / kDepth][i % kDepth];
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      int32_t sum = 0;  // at most 32 * 255 * 128
      for (int k = 0; k < kDepth; ++k) sum += wide_a[row * kDepth + k] * wide_b[column * kDepth + k];
      sums[row][column] = sum;
    }
  }
}

// Returns whether all sums fit.
template <class A>
CU_FAST_HOT bool multiply_registers(const Warp& warp) {
  A a[kRows][kDepth];
  int8_t b[kColumns][kDepth];
  int32_t sums[kRows][kColumns];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    const auto& factors = warp.factors[lane];
    for (int i = 0; i < 4; ++i) std::memcpy(&a[g + i % 2 * 8][i / 2 * 16 + 4 * q], &factors.a[i], 4);
    for (int i = 0; i < 2; ++i) std::memcpy(&b[g][i * 16 + 4 * q], &factors.b[i], 4);
  }
  multiply_any(a, b, sums);
  bool fits = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    int32_t* const d = warp.factors[lane].d;
    for (int i = 0; i < 4; ++i) {
      const int64_t sum = int64_t{d[i]} + sums[g + i / 2 * 8][2 * q + i % 2];
      d[i] = static_cast<int32_t>(static_cast<uint32_t>(sum));  // modulo 2^32
      fits &= d[i] == sum;
    }
  }
  return fits;
}

}  // namespace

void multiply(const uint8_t (&a)[kRows][kDepth], const int8_t (&b)[kColumns][kDepth],
              int32_t (&sums)[kRows][kColumns]) {
  multiply_any(a, b, sums);
}

void multiply(const int8_t (&a)[kRows][kDepth], const int8_t (&b)[kColumns][kDepth],
              int32_t (&sums)[kRows][kColumns]) {
  multiply_any(a, b, sums);
}

void multiply_fragments(const Warp& warp) {
  multiply_registers<uint8_t>(warp);
}

bool multiply_signed_fragments(const Warp& warp) {
  return multiply_registers<int8_t>(warp);
}

}  // namespace cu_fast::emulation
