// What the two scans of the codes (scan_codes.cu, scan_codes_sm90.cu) share: how a warp reads its codes, and
// what it does with their sums.
//
//   approx = (256 I_0 + I_1) scale_j (256 unit) + mean_dot factor_j unit + bias_j
//   error  = norm residual_j + miss size_j + kScanRounding (norm magnitude + |bias_j|) + kScanTiny
//
//   what   shape                       where it stays
//   plane  [G, E / 4, 64, 4] uint8     global -> registers, not through L1: one warp reads it
//   sums   [2, columns, 4] per thread  registers; I_0 and I_1 side by side. A column is four tokens
//
// 1. A warp takes 32 codes, in two products of 16 rows. Rows and k may be permuted freely. In lane 4 g + q,
//    codes 4 g and 4 g + 1 are rows g and g + 8 of the first product, 4 g + 2 and 4 g + 3 of the second;
//    words q and q + 4 of a step are its k. So one 16-byte load of a thread is one word of four neighbouring
//    codes, and eight lanes load a whole 128-byte line.
// 2. In the sample (some tiles only) a thread writes the largest approximation of four codes, for
//    scan_threshold. Otherwise a code whose upper bound reaches tau becomes a candidate. A warp takes places
//    for all its candidates of a token with one atomic. A candidate without a place still counts: the row is
//    incomplete.
//
// A deleted code is a candidate only if hits are counted, and is then flagged (bit 31). It never raises tau.

#pragma once

#include "cuda/fixed.h"
#include "cuda/kernels.h"
#include "cuda/mask.h"

namespace cu_fast {

inline constexpr float kWiden = 1.0f + 0x1p-18f;  // covers the rounding errors of computing the bound

// The codes of this thread's warp in a tile.
struct WarpCodes {
  int first;
  int words;          // words per code, zeros after them; 0: codes beyond C
  const uint8_t* at;  // word 0 of this thread's four codes; of other codes if words is 0

  CU_FAST_DEVICE WarpCodes(const SelectParams& p, int tile)
      : first(tile * int{kScanTile} + 32 * warp_index()),
        words(first < p.score.C ? static_cast<int>(scan_width(p.score.E) / 4) : 0),
        at(p.scan.group(words > 0 ? first / kScanGroup : 0, p.score.E) + first % kScanGroup * 4 +
           16 * (lane_index() / 4)) {}

  CU_FAST_DEVICE uint4 load(int word) const {
    if (word >= words) return make_uint4(0, 0, 0, 0);
    return load_streaming(at + word * (4 * kScanGroup));
  }
  // Without a branch. Returns an arbitrary word if this one does not exist.
  CU_FAST_DEVICE uint4 load_any(int word) const {
    return load_streaming(at + (word < words ? word : 0) * (4 * kScanGroup));
  }
};

// The a registers of both products, from words q (near) and q + 4 (far) of a step.
struct Factors {
  uint32_t of[2][4];

  CU_FAST_DEVICE void set(uint4 near, uint4 far) {
    of[0][0] = near.x, of[0][1] = near.y, of[0][2] = far.x, of[0][3] = far.y;
    of[1][0] = near.z, of[1][1] = near.w, of[1][2] = far.z, of[1][3] = far.w;
  }
};

// Four codes of this thread: 4 g .. 4 g + 3 of the warp's 32.
struct FourCodes {
  float scale[4], residual[4], size[4], factor[4], bias[4];
  float magnitude;
  bool exists[4];
};

CU_FAST_DEVICE FourCodes load_codes(const SelectParams& p, int first) {
  FourCodes codes;
  const int64_t g = first / kScanGroup, at = first % kScanGroup;
  codes.magnitude = first < p.score.C ? p.scan.largest(g, kMagnitude) : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t j = first + i;
    codes.exists[i] = j < p.score.C;
    codes.scale[i] = codes.exists[i] ? p.scan.terms_of(g, kScale)[at + i] : 0;
    codes.residual[i] = codes.exists[i] ? p.scan.terms_of(g, kResidual)[at + i] : 0;
    codes.size[i] = codes.exists[i] ? p.scan.terms_of(g, kSize)[at + i] : 0;
    codes.factor[i] = codes.exists[i] ? p.score.factor[j] : 0;
    // Cut as the score is: that of a code of zeros is its bias alone.
    codes.bias[i] = codes.exists[i] && p.score.bias != nullptr ? cut(p.score.bias[j]) : 0;
  }
  return codes;
}

struct Bounds {
  float approx, lower, upper;
};

// Of code i; first and second: its products with the row's digits, the codes' offset included.
CU_FAST_DEVICE Bounds bounds_of(const RowTerms& row, const FourCodes& codes, int i, int32_t first,
                                int32_t second) {
  const float sum = 256.0f * static_cast<float>(wrapping_add(first, row.start[0])) +
                    static_cast<float>(wrapping_add(second, row.start[1]));
  const float approx =
      sum * codes.scale[i] * (256.0f * row.unit) + row.mean_dot * codes.factor[i] * row.unit + codes.bias[i];
  const float error =
      kWiden * (row.norm * codes.residual[i] + row.miss * codes.size[i] +
                kScanRounding * (row.norm * codes.magnitude + fabsf(codes.bias[i])) + kScanTiny);
  if (!is_finite(error)) return {-INFINITY, -INFINITY, INFINITY};  // approx may not be finite either
  return {approx, approx - error, approx + error};
}

// Stores the candidates among the warp's codes. All lanes of the warp take part; passes: of this thread's
// four codes.
CU_FAST_DEVICE void keep_candidates(const SelectJob& job, int64_t t, int first, const Bounds (&bounds)[4],
                                    const bool (&passes)[4], uint32_t deleted) {
  const ScanWork& work = job.work;
  const int lane = lane_index(), g = lane / 4, q = lane % 4;
  // Lanes of one q share a token: they count their candidates, and the first of them takes the places.
  const uint32_t ours = 0x11111111u << q, before = ours & ((1u << lane) - 1);
  int32_t place = 0, total = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t passing = ballot(passes[i]);
    place += count_bits(passing & before);
    total += count_bits(passing & ours);
  }
  int32_t base = 0;
  if (g == 0 && total > 0) base = atomic_add(&work.count[t], total);
  place += shuffle(base, q);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!passes[i]) continue;
    const bool flagged = deleted >> i & 1;
    if (place < job.plan.candidates) {
      const int64_t at = t * job.plan.candidates + place;
      work.id[at] = static_cast<int32_t>(static_cast<uint32_t>(first + i) | uint32_t{flagged} << 31);
      work.lower[at] = flagged ? -INFINITY : bounds[i].lower;
      work.upper[at] = bounds[i].upper;
      work.scored[at] = quiet_nan();
    }
    ++place;
  }
}

// Turns the sums into bounds, and those into maxima (sample) or candidates.
template <bool kSample, int kColumns>
CU_FAST_DEVICE void end_tile(const SelectJob& job, const WarpCodes& codes, int t0, int visit, int visited,
                             const int32_t (&sums)[2][kColumns][4]) {
  const SelectParams& p = job.p;
  const ScanWork& work = job.work;
  const int lane = lane_index(), g = lane / 4, q = lane % 4;
  const FourCodes four = load_codes(p, codes.first + 4 * g);
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const int64_t t = t0 + 4 * column + q;
    const RowTerms row = t < p.score.T ? work.terms[t] : RowTerms{quiet_nan()};
    const bool scans = row.unit == row.unit;
    const uint32_t deleted = scans ? MaskRow(p.mask, t).word(codes.first, p.score.C) >> (4 * g) & 15 : 0;
    Bounds bounds[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Code 4 g + i is row g or g + 8 of the first or second product.
      const auto& pairs = sums[i / 2][column];
      bounds[i] = bounds_of(row, four, i, pairs[i % 2 * 2], pairs[i % 2 * 2 + 1]);
    }
    if constexpr (kSample) {
      float most = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (four.exists[i] && (deleted >> i & 1) == 0) most = fmaxf(most, bounds[i].approx);
      }
      if (scans)
        work.maxima[t * visited * kMaximaOfTile + visit * kMaximaOfTile + 8 * warp_index() + g] = most;
    } else {
      const float tau = scans ? work.tau[t] : INFINITY;
      bool passes[4];
      bool any = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool runs = (deleted >> i & 1) == 0 || p.deleted != nullptr;
        passes[i] = scans && four.exists[i] && runs && !(bounds[i].upper < tau);
        any |= passes[i];
      }
      if (any_lane(any)) keep_candidates(job, t, codes.first + 4 * g, bounds, passes, deleted);
    }
  }
}

}  // namespace cu_fast
