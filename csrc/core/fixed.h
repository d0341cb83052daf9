// The score: fixed point, an exact integer sum, one rounding. The same bits on every machine.
//
//   q[t][e] = rint(x[t][e] 2^a)     a per row, the largest <= 125 with max|q| <= kLargest; unit = 2^-a
//   p[j][e] = rint(w[j][e] / s_j)   made at packing, |p| <= kLargest
//   S       = sum over e of q[e] p[e], the exact integer
//   score   = ((fp32(S) unit) factor_j) + bias_j      each step rounded to fp32, none fused
//
// A product or a sum below kLeast in magnitude becomes +0.0, so that no result depends on how a processor treats
// denormals. |S| < 2^62, since E <= 65,535.
//
//   what     shape            layout
//   digits   [C, 3, W] int8   p = 65536 d0 + 256 d1 + d2, the highest first; W = E padded to 64 with zeros
//   factor   [C] float        of a code with NaN or Inf: NaN, and so are its scores
//
// Which digits a kernel cuts q and p into is its own business.

#pragma once

#include <bit>
#include <cstdint>

#include "core/sum16.h"
#include "core/portable.h"

namespace cu_fast {

inline constexpr int kDigits = 3;
inline constexpr int32_t kLargest = 127 * (65536 + 256 + 1);
inline constexpr int kMostShift = 125;
inline constexpr float kLeast = 0x1p-125f;
inline constexpr float kLeastRow =
    0x1p-100f;  // of weights: a row whose largest entry is below counts as zeros
inline constexpr int64_t kMostWidth = 65535;

// Bytes per digit of a row.
CU_FAST_BOTH inline int64_t digit_width(int64_t E) {
  return round_up(E, 64);
}

// a of a row, given its largest magnitude, which is finite. Of a row of zeros, as of one of denormals, q is 0
// whatever a is.
CU_FAST_BOTH inline int shift_of(float largest) {
  const uint32_t bits = std::bit_cast<uint32_t>(largest);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  const uint32_t fraction = bits & 0x7fffff;
  // largest = (1 + fraction / 2^23) 2^exponent: with a = 22 - exponent, q is half of 2^23 + fraction.
  const int a = (fraction | 0x800000) <= 2u * kLargest ? 22 - exponent : 21 - exponent;
  return a < kMostShift ? a : kMostShift;
}

// 2^n, of -126 <= n <= 127.
CU_FAST_BOTH inline float power_of_two(int n) {
  return std::bit_cast<float>(static_cast<uint32_t>(n + 127) << 23);
}

CU_FAST_BOTH inline float cut(float y) {
  return y < kLeast && y > -kLeast ? 0.0f : y;
}

// Balanced digits of an integer of at most kLargest: d[0] is the highest.
CU_FAST_BOTH inline void cut_digits(int32_t q, int8_t (&d)[kDigits]) {
  d[2] = static_cast<int8_t>(q);
  q = (q - d[2]) >> 8;
  d[1] = static_cast<int8_t>(q);
  d[0] = static_cast<int8_t>((q - d[1]) >> 8);
}

}  // namespace cu_fast
