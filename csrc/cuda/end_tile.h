// What the scans of the codes do with the sums of a tile: maxima of the sample, or candidates.
//
//   approx = (((256 I_0 + I_1) (256 scale_j)) + mean_dot factor_j) unit + bias_j       both sums fused
//   error  = norm residual_j + miss size_j + kScanRounding (norm magnitude + |bias_j|) + kScanTiny
//
//   what     shape                           where it stays
//   rows     [kTokens] terms and tau         shared, once per block
//   sums     [2, kTokens / 4, 4] per thread  registers; I_0 and I_1 side by side. A column is four tokens
//   deleted  [kWarps, kTokens] uint32        shared: bits of the sample's codes
//   list     [kListed] of 2 x 4 sums         shared: of four codes and a token each
//
// 1. Sums start at the row's `start`, which cancels the codes' offset.
// 2. In the sample a thread writes the largest approximation of four codes, for scan_threshold.
// 3. Otherwise a cheap test comes first, per token and of a thread's four codes together. It looks at no mask. Fours
//    that pass get places in the list.
// 4. In rounds of kListed places: the list is written, and each thread takes an entry and computes the bounds. A code
//    whose upper bound reaches tau is a candidate. A deleted code is one only if hits are counted, and is then
//    flagged (bit 31). It never raises tau.
// 5. A round counts its candidates per token, and takes their places in the token's row with one atomic. A candidate
//    without a place still counts: the row is incomplete.
//
// The cheap test loses no code with score >= tau. With A = I_0 + floor(I_1 / 256), 65536 A is less than 65536 below
// 256 (256 I_0 + I_1). So
//
//   approx' = (A (65536 scale_j) + mean_dot factor_j) unit + bias_j
//   score  <= approx' + norm residual_j + miss size_j + 65536 unit |scale_j| + roundings + kScanTiny
//
// kScanRounding covers 32 roundings relative to norm magnitude + |bias_j|, and approx' and the score have a dozen. With
// the largest residual R, size S, |bias| B and |scale| X of the four, the test is approx' >= slack:
//
//   sum   = norm (magnitude + R / kScanRounding) + miss S / kScanRounding + unit 65536 X / kScanRounding
//           + B + kScanTiny / kScanRounding
//   slack = tau - kWiden kScanRounding sum
//
// - No term of the sum is negative, and kWiden covers 64 roundings relative to it; it has six.
// - slack is rounded once, from the exact difference, however large tau is. Rounding is monotone: where approx', an
//   fp32 number, is not below the difference, it is not below slack.
// - A finite sum bounds norm magnitude + |bias_j|, which bounds each term of approx': it does not overflow. Another sum
//   makes slack -Inf or NaN, and the four pass, as !(approx' < slack). fmaxf leaves out a NaN: with a finite sum that
//   is a code whose bias or factor is NaN, and so its score.
// - Rows that do not exist, or that the scan cannot do, have terms of 0 and tau = Inf; codes beyond C have a bias of
//   -Inf. What passes nevertheless is dropped with the bounds.

#pragma once

#include "cuda/fixed.h"
#include "cuda/mask.h"
#include "cuda/select.h"

namespace cu_fast {

inline constexpr float kWiden = 1.0f + 0x1p-18f;  // covers the rounding errors of computing the bound
inline constexpr int kListed = kThreads;

// The rows of a tile of tokens.
template <int kTokens>
struct TileRows {
  RowTerms terms[kTokens];  // unit = 0: there is no row, or none that the scan can do
  float tau[kTokens];
};

// Fours that passed the cheap test, and what their candidates need.
template <int kTokens>
struct TileList {
  int4 sums[kListed][2];        // of four codes, as end_tile has them
  int32_t token_code[kListed];  // 256 token + code, both within the tile
  // Of this tile, and 0 for the next: a warp may end the next tile's products before another has read this one.
  int32_t length[2];
  int32_t count[kTokens];  // candidates per token in a round; 0 between rounds
  int32_t place[kTokens];  // of the first of them
};

template <int kTokens>
CU_FAST_DEVICE void load_rows(const SelectJob& job, int t0, bool sample, TileRows<kTokens>& rows) {
  const int i = thread_index();
  if (i >= kTokens) return;
  const int64_t t = t0 + i;
  RowTerms terms = {};
  if (t < job.p.score.T) terms = job.work.terms[t];
  const bool scans = terms.unit > 0;
  rows.terms[i] = scans ? terms : RowTerms{};
  rows.tau[i] = scans && !sample ? job.work.tau[t] : INFINITY;
}

template <int kTokens>
CU_FAST_DEVICE void clear_list(TileList<kTokens>& list) {
  if (thread_index() < kTokens) list.count[thread_index()] = 0;
  if (thread_index() < 2) list.length[thread_index()] = 0;
}

template <int kColumns>
CU_FAST_DEVICE void start_sums(const TileRows<4 * kColumns>& rows, int32_t (&sums)[2][kColumns][4]) {
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const RowTerms& row = rows.terms[4 * column + lane_index() % 4];
    const int32_t start[2] = {row.start[0], row.start[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][column][i] = sums[1][column][i] = start[i % 2];
  }
}

// Four neighbouring codes.
struct FourCodes {
  float scale[4], residual[4], size[4], factor[4], bias[4];
  float magnitude;
  bool exists[4];

  CU_FAST_DEVICE FourCodes(const SelectParams& p, int first) : magnitude(0) {
    const int64_t g = first / kScanGroup, at = first % kScanGroup;
    const int left = static_cast<int>(p.score.C) - first;
    if (left > 0) magnitude = p.scan.largest(g, kMagnitude);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      exists[i] = i < left;
      scale[i] = residual[i] = size[i] = factor[i] = bias[i] = 0;
      if (left > 0) {  // a group has terms of all its codes
        scale[i] = p.scan.terms_of(g, kScale)[at + i];
        residual[i] = p.scan.terms_of(g, kResidual)[at + i];
        size[i] = p.scan.terms_of(g, kSize)[at + i];
      }
      if (exists[i]) factor[i] = p.score.factor[first + i];
      if (exists[i] && p.score.bias != nullptr) bias[i] = p.score.bias[first + i];
    }
    // As the score is: that of a code of zeros is its bias alone. Behind the loads, none of which waits for another.
#pragma unroll
    for (int i = 0; i < 4; ++i) bias[i] = cut(bias[i]);
  }
};

// scale: what the sum still has to be multiplied with.
CU_FAST_DEVICE float approximate(const RowTerms& row, float sum, float scale, float factor, float bias) {
  return fuse(fuse(row.mean_dot, factor, sum * scale), row.unit, bias);
}

// Of code i, from its products with the row's digits.
CU_FAST_DEVICE float approximate(const RowTerms& row, const FourCodes& codes, int i, int32_t first,
                                 int32_t second) {
  const float sum = fuse(256.0f, static_cast<float>(first), static_cast<float>(second));
  return approximate(row, sum, 256.0f * codes.scale[i], codes.factor[i], codes.bias[i]);
}

// Four codes, as the cheap test takes them.
struct CheapCodes {
  float scale[4], factor[4], bias[4];
  float norm, miss, unit, rest;  // in units of kScanRounding: what the row's terms are multiplied with

  CU_FAST_DEVICE explicit CheapCodes(const FourCodes& codes) {
    float most_residual = 0, most_size = 0, most_bias = 0, most_scale = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i] = 65536.0f * codes.scale[i];
      factor[i] = codes.factor[i];
      bias[i] = codes.exists[i] ? codes.bias[i] : -INFINITY;
      most_residual = fmaxf(most_residual, codes.residual[i]);
      most_size = fmaxf(most_size, codes.size[i]);
      most_bias = fmaxf(most_bias, fabsf(codes.bias[i]));
      most_scale = fmaxf(most_scale, fabsf(scale[i]));
    }
    constexpr float kUnits = 1 / kScanRounding;
    norm = codes.magnitude + kUnits * most_residual;
    miss = kUnits * most_size;
    unit = kUnits * most_scale;
    rest = most_bias + kUnits * kScanTiny;
  }

  // Whether one of them may be a candidate of the row. I_0 and I_1 of code 2 h + i are sums[h][2 i] and [2 i + 1].
  CU_FAST_DEVICE bool reaches(const RowTerms& row, float tau, const int32_t (&low)[4],
                              const int32_t (&high)[4]) const {
    const float error = fuse(row.unit, unit, fuse(row.miss, miss, fuse(row.norm, norm, rest)));
    const float slack = fuse(-kWiden * kScanRounding, error, tau);
    float most = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t (&pairs)[4] = i < 2 ? low : high;
      const int32_t sum = wrapping_add(pairs[i % 2 * 2], pairs[i % 2 * 2 + 1] >> 8);
      const float approx = approximate(row, static_cast<float>(sum), scale[i], factor[i], bias[i]);
      most = i == 0 ? approx : fmaxf(most, approx);
    }
    return !(most < slack);
  }
};

struct Bounds {
  float lower, upper;
};

CU_FAST_DEVICE Bounds bounds_of(const RowTerms& row, const FourCodes& codes, int i, int32_t first,
                                int32_t second) {
  const float approx = approximate(row, codes, i, first, second);
  const float error =
      kWiden * (row.norm * codes.residual[i] + row.miss * codes.size[i] +
                kScanRounding * (row.norm * codes.magnitude + fabsf(codes.bias[i])) + kScanTiny);
  if (!is_finite(error)) return {-INFINITY, INFINITY};  // approx may not be finite either
  return {approx - error, approx + error};
}

// What is deleted of the codes of each warp.
template <int kTokens>
struct TileDeleted {
  uint32_t of[kWarps][kTokens];  // a bit per code
};

// first: of the warp's 32 codes. Only the warp itself reads them.
template <int kTokens>
CU_FAST_DEVICE void load_deleted(const SelectJob& job, int t0, int first, TileDeleted<kTokens>& deleted) {
  sync_warp();  // those of the last tile have been read
  for (int token = lane_index(); token < kTokens; token += 32) {
    const bool exists = t0 + token < job.p.score.T;
    deleted.of[warp_index()][token] = exists ? MaskRow(job.p.mask, t0 + token).word(first, job.p.score.C) : 0;
  }
  sync_warp();
}

// Writes the sample's maxima: place is that of the warp's 32 codes among all of a token.
template <int kColumns>
CU_FAST_DEVICE void end_sample(const SelectJob& job, int t0, int64_t place, const FourCodes& codes,
                               const TileRows<4 * kColumns>& rows, const TileDeleted<4 * kColumns>& deleted,
                               const int32_t (&sums)[2][kColumns][4]) {
  const int g = lane_index() / 4, q = lane_index() % 4;
  bool counts[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) counts[i] = codes.exists[i] && is_finite(codes.residual[i]);
  const int64_t stride = job.plan.sample_groups * kMaximaOfGroup;
  float* const maxima = job.work.maxima + t0 * stride + place + g;
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const int token = 4 * column + q;
    const RowTerms row = rows.terms[token];
    const uint32_t gone = deleted.of[warp_index()][token] >> (4 * g);
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& pairs = sums[i / 2][column];
      const float approx = approximate(row, codes, i, pairs[i % 2 * 2], pairs[i % 2 * 2 + 1]);
      // Without a finite bound, as bounds_of would find, a code does not raise the threshold.
      const bool bounded = is_finite(fuse(row.norm, codes.magnitude, fabsf(codes.bias[i])));
      if (counts[i] && bounded && (gone >> i & 1) == 0) most = fmaxf(most, approx);
    }
    if (row.unit > 0) maxima[token * stride] = most;
  }
}

// Finds the candidates of a tile whose codes begin at `first`. All threads of the block take part. turn: 0 and 1, tile
// after tile.
template <int kColumns>
CU_FAST_DEVICE void end_tile(const SelectJob& job, int t0, int first, const TileRows<4 * kColumns>& rows,
                             const CheapCodes& cheap, const int32_t (&sums)[2][kColumns][4],
                             TileList<4 * kColumns>& list, int turn) {
  constexpr int kTokens = 4 * kColumns;
  const SelectParams& p = job.p;
  const ScanWork& work = job.work;
  const int thread = thread_index(), lane = lane_index(), g = lane / 4, q = lane % 4;
  uint32_t passing = 0;  // a bit per column
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const int token = 4 * column + q;
    if (cheap.reaches(rows.terms[token], rows.tau[token], sums[0][column], sums[1][column])) {
      passing |= 1u << column;
    }
  }
  int place = 0;  // in the list, of this thread's first four
  if (any_lane(passing != 0)) {
    const int32_t mine = count_bits(passing);
    int32_t up_to = mine;
    for (int step = 1; step < 32; step *= 2) {
      const int32_t before = shuffle(up_to, lane - step);
      if (lane >= step) up_to += before;
    }
    int32_t base = 0;
    if (lane == 31) base = atomic_add(&list.length[turn], up_to);
    place = shuffle(base, 31) + up_to - mine;
  }
  sync_block();
  const int length = list.length[turn];

#pragma unroll 1
  for (int begin = 0; begin < length; begin += kListed) {
    int at = place - begin;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const int passes = passing >> column & 1;
      if (passes != 0 && static_cast<uint32_t>(at) < kListed) {
        list.token_code[at] = 256 * (4 * column + q) + 32 * warp_index() + 4 * g;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto& pairs = sums[i][column];
          list.sums[at][i] = make_int4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      }
      at += passes;
    }
    sync_block();
    if (thread == 0) list.length[turn] = 0;  // all have read it
    int token = 0, code = 0;
    int32_t local = 0;  // place among the token's candidates of this round
    uint32_t passes = 0, deleted = 0;
    Bounds bounds[4];
    if (begin + thread < length) {
      token = list.token_code[thread] / 256;
      code = first + list.token_code[thread] % 256;
      const RowTerms row = rows.terms[token];
      if (row.unit > 0) {
        const FourCodes codes(p, code);
        deleted = MaskRow(p.mask, t0 + token).word(code / 32 * 32, p.score.C) >> code % 32;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int4 pairs = list.sums[thread][i / 2];
          bounds[i] = bounds_of(row, codes, i, i % 2 ? pairs.z : pairs.x, i % 2 ? pairs.w : pairs.y);
          const bool runs = (deleted >> i & 1) == 0 || p.deleted != nullptr;
          if (codes.exists[i] && runs && !(bounds[i].upper < rows.tau[token])) passes |= 1u << i;
        }
        if (passes != 0) local = atomic_add(&list.count[token], count_bits(passes));
      }
    }
    sync_block();
    if (thread < kTokens && list.count[thread] > 0) {
      list.place[thread] = atomic_add(&work.count[t0 + thread], list.count[thread]);
      list.count[thread] = 0;
    }
    sync_block();
    if (passes == 0) continue;
    int slot = list.place[token] + local;
    int64_t to = int64_t{t0 + token} * job.plan.candidates + slot;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((passes >> i & 1) == 0 || slot >= static_cast<int>(job.plan.candidates)) continue;
      const bool flagged = deleted >> i & 1;
      work.id[to] = static_cast<int32_t>(static_cast<uint32_t>(code + i) | uint32_t{flagged} << 31);
      work.lower[to] = flagged ? -INFINITY : bounds[i].lower;
      work.upper[to] = bounds[i].upper;
      work.scored[to] = quiet_nan();
      ++slot, ++to;
    }
  }
}

}  // namespace cu_fast
