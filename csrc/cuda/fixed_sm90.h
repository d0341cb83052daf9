// Exact scores (core/fixed.h) of 128 tokens and 64 codes on Hopper, by two warpgroups: the sums of a TensorTile
// (cuda/fixed.h).
//
//   S(t, j) = sum over levels l of 256^(4 - l) L_l      L_l = sum over i + i' = l of <q_t digit i, p_j digit i'>
//
//   what    shape                           where it stays
//   ring    [kStages, 4, 3, 192, 16] int8   dynamic shared memory: 64 entries of all rows per stage, in four pieces
//   p       [2, 3, 4] uint32 per thread     registers: the codes of both steps of 32 entries of a stage
//   levels  [8, 5, 4] int32 per thread      registers
//
// 1. A warpgroup takes all 64 codes and half of the tokens. Codes are the first factor of multiply_signed_tile, in
//    registers: each digit is loaded once for three multiplies. Read by each from shared memory, codes and tokens
//    would take all its bandwidth. Tokens are the second factor.
// 2. Eight rows of 16 bytes are a core matrix. Four threads copy the 64 bytes of a row's digit, whole sectors; kPad
//    puts what neighbours copy into different banks.
// 3. Nine multiplies are a group, which runs while the next step's codes are loaded into the other registers.
//    Three multiplies of 192 columns, all digits of the tokens, would do too, but into levels that overlap: nvcc
//    spills those.
// 4. While a stage is multiplied, a later one is copied to where the last but one was: all warps have waited for
//    the multiplies that read that.
//
// Sums of rows beyond T or C are not used.

#pragma once

#include "cuda/device_sm90.h"
#include "cuda/fixed.h"

namespace cu_fast {

// A warp has 16 codes and 64 tokens: sums, and what each() makes of them, are those of a TensorTile.
struct WarpgroupTile : TensorTile<128, 1, 8, 2> {
  static constexpr int kStages = 5, kStep = 64, kPieces = kStep / 16, kPad = 32;
  struct Plane {  // 16 entries of every row
    int8_t rows[kDigits][kRows][16];
    int8_t pad[kPad];
  };
  struct Ring {
    alignas(16) Plane planes[kStages][kPieces];
  };
  static constexpr int kDynamicShared = sizeof(Ring);
  struct Shared {};

  // As TensorTile::multiply; between two calls the block has to be synced.
  CU_FAST_DEVICE static void multiply(const ScoreParams& p, const FixedRows& rows, int64_t t0, int64_t c0,
                                      Shared&, Sums& sums) {
#ifdef CU_FAST_HAS_HOPPER
    Ring& ring = dynamic_shared_memory<Ring>();
    const int64_t width = digit_width(p.E);
    const int steps = static_cast<int>(width / kStep), lane = lane_index();
    // Each thread copies a piece of kShares rows, tokens before codes. A row that does not exist counts as the last.
    constexpr int kShares = kRows * kPieces / kThreads, kTokenShares = kTokens * kPieces / kThreads;
    static_assert(kShares * kThreads == kRows * kPieces && kTokenShares * kThreads == kTokens * kPieces);
    const int piece = thread_index() % kPieces, first_row = thread_index() / kPieces;
    const int8_t* from[kShares];
#pragma unroll
    for (int i = 0; i < kShares; ++i) {
      const int row = first_row + i * (kThreads / kPieces);
      const int64_t t = t0 + row, j = c0 + row - kTokens;
      from[i] =
          16 * piece + (row < kTokens ? rows.row(t < p.T ? t : p.T - 1) : p.code(j < p.C ? j : p.C - 1));
    }
    const auto copy_rows = [&](int step, int first_share, int shares) {
      Plane& plane = ring.planes[step % kStages][piece];
#pragma unroll
      for (int i = first_share; i < first_share + shares; ++i) {
        if (step >= steps) continue;
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit) {
          copy_async(plane.rows[digit][first_row + i * (kThreads / kPieces)],
                     from[i] + digit * width + step * kStep, true);
        }
      }
    };

    sums = {};
    auto& level = sums.level[0];
#pragma unroll
    for (int b = 0; b < 8; ++b) fence_sums(level[b]);
    for (int i = 0; i < kStages - 2; ++i) {
      copy_rows(i, 0, kShares);
      commit_copies();
    }
    uint32_t codes[2][kDigits][4];  // multiplies may read them beyond their step
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 3>();
      fence_writes();
      sync_block();  // all warps have waited for the multiplies of step - 2
      const auto& planes = ring.planes[step % kStages];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit) {
          load_matrices(codes[half][digit],
                        planes[2 * half + lane / 16].rows[digit][kTokens + first_code() + lane % 16]);
        }
        fence_multiplies();
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit) {
          const uint64_t tokens =
              describe_tile(planes[2 * half].rows[digit][first_token()], sizeof(Plane), 8 * 16);
#pragma unroll
          for (int other = 0; other < kDigits; ++other) {
            multiply_signed_tile(level, digit + other, codes[half][other], tokens);
          }
        }
        commit_multiplies();
        // Behind the multiplies, so that load_matrices does not wait for them: first tokens, then codes.
        copy_rows(step + kStages - 2, half * kTokenShares, half == 0 ? kTokenShares : kShares - kTokenShares);
        wait_multiplies<1>();
      }
      commit_copies();
    }
    wait_multiplies<0>();
#pragma unroll
    for (int b = 0; b < 8; ++b) fence_sums(level[b]);
    wait_copies<0>();
#else
    __trap();  // has_hopper() keeps it from being launched here
#endif
  }
};

}  // namespace cu_fast
