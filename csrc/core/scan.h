// The scan plane: codes in int8, read instead of the codes, with what bounds the error of doing so.
//
//   codes_j = mean + d_j           d_j ~ step_j q_j,   q_j in [-127, 127]
//   z       ~ unit (p + base h)    p, h in [-range, range]; h only where z has outliers
//
//   approx(t, j) = unit scale_j I + <z, mean> inv_norm_j + bias_j      I = <p + base h, q_j>, exact
//
//   |approx - score| <= norm_in residual_j + miss size_j + l1_out scale_j / 2 + norm epsilon magnitude_g
//                       + rounding of the bias
//
//   scale_j     step_j |inv_norm_j|          (inv_norm is 1 where there is none)
//   residual_j  ||d_j - step_j q_j|| |inv_norm_j|
//   size_j      ||step_j q_j|| |inv_norm_j|
//   magnitude_g the group's largest (||codes_j|| + ||mean|| + 2 size_j) |inv_norm_j|: what roundings are
//               relative to
//   norm_in, l1_out   ||z|| over the dimensions without outliers, and sum |z| over those with:
//               |<z, d - step q>| is at most Cauchy-Schwarz on the former, and half a step for each unit of
//               the latter, since q is rounded to nearest
//   miss        ||z - unit (p + base h)||
//
// A code whose error has no finite bound has residual = infinity: it is always a candidate.
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

#include "core/canonical.h"
#include "core/portable.h"

namespace cu_fast {

inline constexpr int kScanGroup = 64;
inline constexpr int kOffset = 128;  // what makes q unsigned, as the byte product wants one side

enum Term { kScale, kResidual, kSize, kMagnitude };
inline constexpr int kTermsOfGroup = 3 * kScanGroup + 4;

CU_FAST_BOTH inline int64_t scan_groups(int64_t C) {
  return (C + kScanGroup - 1) / kScanGroup;
}

// Bytes of a row of z, or of a code, in the plane.
CU_FAST_BOTH inline int64_t scan_width(int64_t E) {
  return round_up(E, 4);
}

// I must fit into 32 bits: |I| <= ||p|| ||q|| <= 127^2 E. Products on the way may wrap.
inline constexpr int64_t kMaxScanWidth = 131072;

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

// Relative to norm * magnitude: rounding of a canonical dot product (one product, E / 16 + 4 sums), of
// <z, mean>, which is one too, and of the few operations of either epilogue; underflow is smaller still in
// the ranges below. 1 % covers the products of such errors.
CU_FAST_BOTH inline float scan_epsilon(int64_t E) {
  return 1.01f * 0x1p-24f * static_cast<float>(E / kLanes + 40);
}

// A row of z is scanned if its largest entry lies between these, a code is certified if its norm and its norm
// times inv_norm do (or are zero): nothing overflows and no underflow is larger than epsilon says.
inline constexpr float kSmallest = 0x1p-40f, kLargest = 0x1p40f;

// Entries of a row that may lie above its clip (the largest entry that p reaches): a few per cent more work,
// for a unit of half the size or less.
CU_FAST_BOTH inline int64_t max_outliers(int64_t E) {
  return E / 64 > 4 ? E / 64 : 4;
}
// With the clip at largest / 2^7, high bytes stay within 64.
inline constexpr int kMaxHalvings = 7;

// More than this, and the buffers of candidates outgrow the cache that they are to stay in: the exact scan
// has none.
inline constexpr int64_t kMaxScanK = 1024;

}  // namespace cu_fast
