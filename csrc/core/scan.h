// The scan plane: the codes in int8, and the terms that bound the error of scoring with them.
//
// What is scanned are the integers whose exact product the score is made of (core/fixed.h): rows q_t, which count in
// units of 2^-a, and codes p_j.
//
//   p_j = mean + d_j     d_j ~ step_j c_j       c_j in [-127, 127]
//   q_t ~ step_t b_t     on a CPU b = low + base high, both in [-range, range], base = 2 range, and high is zero except
//                        in outliers; on a GPU b = 256 d_0 + d_1, the highest digits of q, and step_t = 256;
//                        on a CPU's matrix tiles either, added as on a CPU (cpu/scan_tiles-inl.h)
//
//   approx(t, j) = (<b_t, c_j> scale_j) (2^-a step_t) + (<q_t, mean> factor_j) 2^-a + bias_j       on a CPU
//                  (<b_t, c_j> (step_t scale_j) + <q_t, mean> factor_j) 2^-a + bias_j              on a GPU, fused
//
//   |approx - score| <= norm_in residual_j + miss size_j + l1_out |scale_j| / 2
//                       + kScanRounding (norm magnitude_g + |bias_j|) + kScanTiny
//
//   scale_j      step_j factor_j
//   residual_j   ||d_j - step_j c_j|| |factor_j|
//   size_j       ||step_j c_j|| |factor_j|
//   magnitude_g  the group's largest (||p_j|| + ||mean|| + 2 size_j) |factor_j|: rounding errors are relative to it
//   norm         2^-a ||q||; Inf where fp32(S) 2^-a may overflow (norm_of)
//   miss         2^-a ||q - step b||
//   norm_in      2^-a ||q|| over the entries that are not outliers
//   l1_out       2^-a times the sum of |q| over the outliers
//
// <q, d_j - step_j c_j> is bounded by Cauchy-Schwarz over the entries that are not outliers, and by half a step per
// unit of |q| over the outliers, because c is rounded to nearest.
//
// No row is too small or too large for this, and hardly a code: one whose |factor| is neither 0 nor in
// [kLeastFactor, kMostFactor] has residual = Inf. step_t, step_j and miss are taken as 1 where they are less. So, in the
// order that is written above, only the last products and sums can leave fp32's range (what comes before stays below
// 2^110):
// - One that underflows, or is flushed, loses at most 2^-126: kScanTiny. What a residual_j or <q, mean> factor_j that
//   underflows loses is less than kScanRounding norm magnitude.
// - One that overflows has a bound that is Inf or NaN, since magnitude_g and bias_j hold it: the code is a candidate,
//   and its lower bound, -Inf or NaN, raises no threshold.
// - A score may be Inf, and so never selected, where its approximation is not: |factor_j| < 1 comes last. So no code of
//   a row for which that may be has a bound.
//
//   what    shape                             layout
//   plane   [G, ceil(E/4), 64, 4] uint8       c + 128: a group of 64 codes is one stream of memory
//   terms   [G, kTermsOfGroup] float          scale[64], residual[64], size[64], then the group's largest of
//                                             each and magnitude
//   mean    [E] float                         null: zero, and nothing is computed with it
//
// G = ceil(C / 64). Codes beyond C have c = 0 and terms of 0.

#pragma once

#include <cstdint>

#include "core/sum16.h"
#include "core/portable.h"

namespace cu_fast {

inline constexpr int kScanGroup = 64;
inline constexpr int kOffset = 128;  // c + 128 is unsigned: vpdpbusd and vpmaddubsw take u8 x s8

enum Term { kScale, kResidual, kSize, kMagnitude };
inline constexpr int kTermsOfGroup = 3 * kScanGroup + 4;

CU_FAST_BOTH inline int64_t scan_groups(int64_t C) {
  return (C + kScanGroup - 1) / kScanGroup;
}

// Bytes per row, and per code in the plane: E, padded to whole 32-bit words.
CU_FAST_BOTH inline int64_t scan_width(int64_t E) {
  return round_up(E, 4);
}

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

// The norm of a row, given 2^-a ||q||: |S| <= ||q|| ||p_j||, and ||p_j|| < 2^31.
CU_FAST_BOTH inline float norm_of(float x) {
  return x * 0x1p31f * 0x1p-31f;
}

// Relative to norm * magnitude and the bias: about ten roundings of approx, and the score's three.
inline constexpr float kScanRounding = 0x1p-19f;
// Absolute: four products that underflow, and twice the score's cut (kLeast).
inline constexpr float kScanTiny = 0x1p-120f;
// The least is that of pack_codes: the step of a row of kLeastRow. The most: weights of 2^62.
inline constexpr float kLeastFactor = 0x1p-123f, kMostFactor = 0x1p40f;

// Entries of a row that may be above its clip, the largest |q| that low bytes represent. They cost a few per cent more
// work; in return the step is half as large, or less.
CU_FAST_BOTH inline int64_t max_outliers(int64_t E) {
  return E / 64 > 4 ? E / 64 : 4;
}
// The clip is at least largest / 2^7, so that |high| <= 2^7 / 2 = 64: in range on AVX2 too (cpu/vec_avx2.h).
inline constexpr int kMaxHalvings = 7;

// For larger k the buffers of candidates would not stay in the cache: the exact scan, which has none, is
// used.
inline constexpr int64_t kMaxScanK = 1024;

}  // namespace cu_fast
