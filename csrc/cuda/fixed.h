// Exact scores (core/fixed.h) of a tile of tokens and codes, by a block.
//
//   S(t, j) = sum over levels l of 256^(4 - l) L_l      L_l = sum over i + i' = l of <q_t digit i, p_j digit i'>
//
//   what    shape                 QuadTile (1 or 4 x 64)      TensorTile (16 or 128 x 64)
//   q       [T, 3, W] int8        global: L1 serves it        shared, 32 entries of a row at a time
//   p       [C, 3, W] int8        registers, loaded ahead     shared, 32 entries of a row at a time
//   levels  [5] int32 per output  registers                   registers
//
// 1. Nine products of digits go to five sums, one per level. Each is exact in an int32, and so neither the
//    order of the sums nor whether an overflow wraps matters.
// 2. QuadTile: few tokens, the time is that of loading codes. Four neighbouring threads, a quad, share a code:
//    16 of 64 entries each, by dot products of four bytes.
// 3. TensorTile: products of 16 codes, 8 tokens and 32 entries on the tensor cores. Every digit is loaded once
//    for all nine products. Stages arrive by asynchronous copies while others are multiplied.
//    Its twin for many tokens on Hopper: fixed_sm90.h. Which tile is chosen: tiles.h.
// 4. At the end the levels of an output become one int64, which is rounded to fp32 once.
//
// Sums of rows beyond T or C are not used.

#pragma once

#include "core/fixed.h"
#include "core/order.h"
#include "core/params.h"
#include "cuda/device.h"
#include "cuda/load.h"
#include "cuda/select.h"

namespace cu_fast {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kLevels = 2 * kDigits - 1;
inline constexpr int kAllRounds = -1;
// Codes per tile, for any number of tokens.
inline constexpr int kTileCodes = 64;

// The sum of the levels, each 256 times the next.
CU_FAST_DEVICE int64_t sum_levels(const int32_t (&level)[kLevels]) {
  int64_t total = level[0];
#pragma unroll
  for (int l = 1; l < kLevels; ++l) total = total * 256 + level[l];
  return total;
}

// What the sums of a code are scored with.
struct CodeTerms {
  float factor, bias;
};

CU_FAST_DEVICE CodeTerms load_terms(const ScoreParams& p, int64_t j) {
  return {p.factor[j], p.bias == nullptr ? 0.0f : p.bias[j]};
}

// A bias of zero changes nothing: what was cut stays as it is.
CU_FAST_DEVICE float round_score(int64_t total, float unit, CodeTerms code) {
  return cut(add(cut(multiply(multiply(to_float(total), unit), code.factor)), code.bias));
}

// The key of code j (core/order.h); kEmpty if its score is not finite.
CU_FAST_DEVICE uint64_t key_of_sum(int64_t total, float unit, CodeTerms code, int64_t j) {
  const float score = round_score(total, unit, code);
  return is_finite(score) ? key_of(score, static_cast<int32_t>(j)) : kEmpty;
}

// 16 neighbouring entries of a row, in digits.
struct Digits16 {
  uint4 of[kDigits];
};

CU_FAST_DEVICE Digits16 load_digits(const int8_t* row, int64_t width, int64_t column) {
  Digits16 digits;
#pragma unroll
  for (int i = 0; i < kDigits; ++i) {
    digits.of[i] = *reinterpret_cast<const uint4*>(row + i * width + column);
  }
  return digits;
}

CU_FAST_DEVICE void add_products(int32_t (&level)[kLevels], const Digits16& q, const Digits16& p) {
#pragma unroll
  for (int i = 0; i < kDigits; ++i) {
#pragma unroll
    for (int j = 0; j < kDigits; ++j) {
      int32_t& sum = level[i + j];
      sum = dot_bytes(sum, q.of[i].x, p.of[j].x);
      sum = dot_bytes(sum, q.of[i].y, p.of[j].y);
      sum = dot_bytes(sum, q.of[i].z, p.of[j].z);
      sum = dot_bytes(sum, q.of[i].w, p.of[j].w);
    }
  }
}

// Entries that a quad works on at a time, 16 per thread.
inline constexpr int kQuadStep = 64;

// Adds this thread's share of the products of kM rows and a code: of columns [0, columns) after `column` of the
// code. q(m, c) returns entries [c, c + 16) of row m. columns is a multiple of kQuadStep.
template <int kM, int kLoads, class Q>
CU_FAST_DEVICE void add_columns(int32_t (&level)[kM][kLevels], const int8_t* code, int64_t width,
                                int64_t column, int columns, const Q& q) {
  const int mine = 16 * (thread_index() % 4);
  for (int first = 0; first < columns; first += kLoads * kQuadStep) {
    Digits16 p[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = first + i * kQuadStep;
      if (at < columns) p[i] = load_digits(code, width, column + at + mine);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = first + i * kQuadStep;
      if (at >= columns) break;
#pragma unroll
      for (int m = 0; m < kM; ++m) add_products(level[m], q(m, at + mine), p[i]);
    }
  }
}

// A quad's exact sum, in all four threads. All lanes of the warp take part.
CU_FAST_DEVICE int64_t quad_total(const int32_t (&level)[kLevels]) {
  int64_t total = sum_levels(level);
  total += shuffle_xor(total, 2);
  return total + shuffle_xor(total, 1);
}

template <int kM>
struct QuadTile {
  static constexpr int kTokens = kM, kRound = kM;
  static constexpr bool kListsInShared = true;
  static constexpr int kBlocks = 2;  // per multiprocessor
  static constexpr int kDynamicShared = 0;
  static constexpr int kLoads = kM == 1 ? 4 : 1;

  struct Shared {};
  struct Sums {
    int64_t total[kM];
  };

  // The sums of the tokens from t0 and the codes from c0.
  CU_FAST_DEVICE static void multiply(const ScoreParams& p, const FixedRows& rows, int64_t t0, int64_t c0,
                                      Shared&, Sums& sums) {
    const int64_t width = digit_width(p.E), j = c0 + thread_index() / 4;
    int32_t level[kM][kLevels] = {};
    if (j < p.C) {
      const auto q = [&](int m, int column) {
        // A token beyond the last one counts as the last: its sum is not used.
        const int64_t t = t0 + m < p.T ? t0 + m : p.T - 1;
        return load_digits(rows.row(t), width, column);
      };
      add_columns<kM, kLoads>(level, p.code(j), width, 0, static_cast<int>(width), q);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) sums.total[m] = quad_total(level[m]);
  }

  // Calls use(token, code, terms, total) for the pairs of the tile that exist, each in one thread.
  template <class Use>
  CU_FAST_DEVICE static void each(const Sums& sums, const ScoreParams& p, int64_t t0, int64_t c0, int,
                                  const Use& use) {
    const int code = thread_index() / 4;
    if (thread_index() % 4 != 0 || c0 + code >= p.C) return;
    const CodeTerms terms = load_terms(p, c0 + code);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (t0 + m < p.T) use(m, code, terms, sums.total[m]);
    }
  }
};

// A warp has 16 kA codes and 8 kB tokens.
template <int kMTokens, int kA, int kB, int kStages>
struct TensorTile {
  static constexpr int kTokens = kMTokens, kRound = kTokens < 64 ? kTokens : 64;
  static constexpr bool kListsInShared = kTokens <= 16;
  static constexpr int kBlocks = kTokens <= 16 ? 2 : 1;
  static constexpr int kDynamicShared = 0;
  static constexpr int kCodeWarps = kTileCodes / (16 * kA), kTokenWarps = kTokens / (8 * kB);
  static_assert(kCodeWarps * kTokenWarps == kWarps, "the warps share the tile");
  static constexpr int kStep = 32, kRows = kTokens + kTileCodes;

  struct Shared {
    alignas(16) int8_t rows[kStages][kDigits][kRows][kStep];  // tokens, then codes
  };
  struct Sums {
    int32_t level[kA][kB][kLevels][4];
  };

  // Where the halves of a row lie: so that the banks of eight neighbouring rows differ.
  CU_FAST_DEVICE static int place(int row, int half) { return half ^ (row / 4 % 2); }
  CU_FAST_DEVICE static int first_code() { return warp_index() % kCodeWarps * (16 * kA); }
  CU_FAST_DEVICE static int first_token() { return warp_index() / kCodeWarps * (8 * kB); }

  CU_FAST_DEVICE static void multiply(const ScoreParams& p, const FixedRows& rows, int64_t t0, int64_t c0,
                                      Shared& shared, Sums& sums) {
    const int64_t width = digit_width(p.E);
    const int steps = static_cast<int>(width / kStep), lane = lane_index();
    constexpr int kPair = kB < 2 ? 1 : 2;  // columns of 8 tokens that are loaded together
    // Two threads copy a row of a stage. A row that does not exist counts as the last: its sums are not used.
    constexpr int kShares = (kRows + kThreads / 2 - 1) / (kThreads / 2);
    const int half = thread_index() % 2;
    const int8_t* from[kShares];
#pragma unroll
    for (int i = 0; i < kShares; ++i) {
      const int row = thread_index() / 2 + i * (kThreads / 2);
      const int64_t t = t0 + row, j = c0 + row - kTokens;
      from[i] = 16 * half + (row < kTokens ? rows.row(t < p.T ? t : p.T - 1) : p.code(j < p.C ? j : p.C - 1));
    }
    const auto copy_stage = [&](int step) {
#pragma unroll
      for (int i = 0; i < kShares; ++i) {
        const int row = thread_index() / 2 + i * (kThreads / 2);
        if (step >= steps || row >= kRows) continue;
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit) {
          copy_async(&shared.rows[step % kStages][digit][row][16 * place(row, half)],
                     from[i] + digit * width + step * kStep, true);
        }
      }
      commit_copies();
    };

    sums = {};
    sync_block();  // what was in this memory before has been read
    for (int i = 0; i < kStages - 1; ++i) copy_stage(i);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      sync_block();
      copy_stage(step + kStages - 1);
      // The address of a row, for a lane of load_matrices: of its first or of its second 16 entries.
      const auto row_at = [&](int digit, int row, int half) {
        return &shared.rows[step % kStages][digit][row][16 * place(row, half)];
      };
      uint32_t a[kA][kDigits][4];
#pragma unroll
      for (int i = 0; i < kA; ++i) {
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit) {
          load_matrices(a[i][digit], row_at(digit, kTokens + first_code() + 16 * i + lane % 16, lane / 16));
        }
      }
#pragma unroll
      for (int digit = 0; digit < kDigits; ++digit) {
#pragma unroll
        for (int b = 0; b < kB; b += kPair) {
          uint32_t words[2 * kPair];
          load_matrices(
              words, row_at(digit, first_token() + 8 * b + lane / 16 % kPair * 8 + lane % 8, lane / 8 % 2));
#pragma unroll
          for (int n = 0; n < kPair; ++n) {
#pragma unroll
            for (int other = 0; other < kDigits; ++other) {
#pragma unroll
              for (int i = 0; i < kA; ++i) {
                multiply_signed(sums.level[i][b + n][digit + other], a[i][other],
                                {words[2 * n], words[2 * n + 1]});
              }
            }
          }
        }
      }
    }
    wait_copies<0>();
  }

  // As QuadTile::each; tokens [kRound round, kRound (round + 1)), or of kAllRounds.
  template <class Use>
  CU_FAST_DEVICE static void each(const Sums& sums, const ScoreParams& p, int64_t t0, int64_t c0, int round,
                                  const Use& use) {
    if (round != kAllRounds && first_token() / kRound != round) return;
    const int g = lane_index() / 4, q = lane_index() % 4;
    const int64_t left = p.T - t0;
    const int tokens = left < kTokens ? static_cast<int>(left) : kTokens;
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int code = first_code() + 16 * i + g + 8 * half;
        if (c0 + code >= p.C) continue;
        const CodeTerms terms = load_terms(p, c0 + code);
#pragma unroll
        for (int b = 0; b < kB; ++b) {
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            int32_t level[kLevels];
#pragma unroll
            for (int l = 0; l < kLevels; ++l) level[l] = computed_here(sums.level[i][b][l][2 * half + odd]);
            const int token = first_token() + 8 * b + 2 * q + odd;
            if (token < tokens) use(token, code, terms, sum_levels(level));
          }
        }
      }
    }
  }
};

}  // namespace cu_fast
