// The scan plane: the codes in int8, and the terms that bound the error of scoring with them.
//
// What is scanned are the numbers that the exact score multiplies (core/fixed.h): as codes_j the integers p_j, as z
// the row q times its unit, which is exact in fp32.
//
//   codes_j = mean + d_j           d_j ~ step_j q_j,   q_j in [-127, 127]
//   z       ~ unit (p + base h)    p, h in [-range, range], base = 2 range; h is zero except in outliers
//
//   approx(t, j) = unit scale_j I + <z, mean> factor_j + bias_j      I = <p + base h, q_j>, exact
//
//   |approx - score| <= norm_in residual_j + miss size_j + l1_out |scale_j| / 2
//                       + norm epsilon magnitude_g + rounding of the bias
//
//   scale_j      step_j factor_j
//   residual_j   ||d_j - step_j q_j|| |factor_j|
//   size_j       ||step_j q_j|| |factor_j|
//   magnitude_g  the group's largest (||codes_j|| + ||mean|| + 2 size_j) |factor_j|: rounding errors are
//                relative to it
//   miss         ||z - unit (p + base h)||
//   norm_in      ||z|| over the entries that are not outliers
//   l1_out       sum of |z| over the outliers
//
// <z, d_j - step_j q_j> is bounded by Cauchy-Schwarz over the entries that are not outliers, and by half a
// step per unit of |z| over the outliers, because q is rounded to nearest. A code whose error has no finite
// bound has residual = infinity: it is always a candidate.
//
//   what    shape                             layout
//   plane   [G, ceil(E/4), 64, 4] uint8       q + 128: a group of 64 codes is one stream of memory
//   terms   [G, kTermsOfGroup] float          scale[64], residual[64], size[64], then the group's largest of
//                                             each and magnitude
//   mean    [E] float                         null: zero, and nothing is computed with it
//
// G = ceil(C / 64). Codes beyond C have q = 0 and terms of 0.

#pragma once

#include <cstdint>

#include "core/sum16.h"
#include "core/portable.h"

namespace cu_fast {

inline constexpr int kScanGroup = 64;
inline constexpr int kOffset = 128;  // q + 128 is unsigned: vpdpbusd and vpmaddubsw take u8 x s8

enum Term { kScale, kResidual, kSize, kMagnitude };
inline constexpr int kTermsOfGroup = 3 * kScanGroup + 4;

CU_FAST_BOTH inline int64_t scan_groups(int64_t C) {
  return (C + kScanGroup - 1) / kScanGroup;
}

// Bytes per row of z, and per code in the plane: E, padded to whole 32-bit words.
CU_FAST_BOTH inline int64_t scan_width(int64_t E) {
  return round_up(E, 4);
}

// kMostWidth of core/fixed.h, padded. I fits into 32 bits, |I| <= ||p|| ||q|| <= 127^2 E < 2^31; partial sums may wrap.
inline constexpr int64_t kMaxScanWidth = 65536;

struct ScanPlane {
  const uint8_t* plane;  // [G, scan_width(E) / 4, 64, 4]; null: there is no plane
  const float* terms;    // [G, kTermsOfGroup]
  const float* mean;     // [E]; null: zero

  CU_FAST_BOTH const uint8_t* group(int64_t g, int64_t E) const {
    return plane + g * scan_width(E) * kScanGroup;
  }
  CU_FAST_BOTH const float* terms_of(int64_t g, Term term) const {
    return terms + g * kTermsOfGroup + term * kScanGroup;
  }
  CU_FAST_BOTH float largest(int64_t g, Term term) const {
    return terms[g * kTermsOfGroup + 3 * kScanGroup + term];
  }
};

// Rounding errors relative to norm * magnitude: of <z, mean> (one product, E / 16 + 4 sums), and of the few
// operations of either epilogue. 1 % covers the products of such errors. Underflow, and the score's cut, are smaller
// still in the range below; the score of a code of zeros is its bias alone, so approx cuts that as the score does.
CU_FAST_BOTH inline float scan_epsilon(int64_t E) {
  return 1.01f * 0x1p-24f * static_cast<float>(E / kLanes + 40);
}

// The range in which nothing overflows and no underflow exceeds epsilon. A row of z is scanned if its largest
// |z| is in it. A code is certified if its norm and its norm times |factor| are in it, or zero.
inline constexpr float kScanSmallest = 0x1p-40f, kScanLargest = 0x1p40f;

// Entries of a row that may be above its clip, the largest |z| that p represents. They cost a few per cent
// more work; in return the unit is half as large, or less.
CU_FAST_BOTH inline int64_t max_outliers(int64_t E) {
  return E / 64 > 4 ? E / 64 : 4;
}
// The clip is at least largest / 2^7, so that |h| <= 2^7 / 2 = 64: in range on AVX2 too (cpu/vec_avx2.h).
inline constexpr int kMaxHalvings = 7;

// For larger k the buffers of candidates would not stay in the cache: the exact scan, which has none, is
// used.
inline constexpr int64_t kMaxScanK = 1024;

}  // namespace cu_fast
