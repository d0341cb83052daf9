// Canonical dot products (core/canonical.h) of a tile of tokens and codes, by a block.
//
//   dot(t, j) = the 16 partials of z_t c_j, added as a tree        multiply, then add: never fused
//
//   what      SomeTokens (1 or 4 x 64)            ManyTokens (16 x 64)
//   z         shared, 960 or 1024 entries per     shared, 64 entries per row at a time
//             row at a time
//   codes     registers, 8 or 12 loads in flight  shared, widened once for all tokens
//   partials  [kM, kN, 4] per thread, registers   the same
//
// 1. Four neighbouring threads, a quad, hold the 16 partials of kM x kN pairs, four each: thread q those of
//    l = 4 q .. 4 q + 3, so that z and codes are read four entries at a time.
// 2. Entries are visited in order, 16 by 16, so each partial adds what the definition says, in its order.
// 3. The tree: l + 8 is in thread q + 2 of the quad, l + 4 in thread q + 1; l + 2 and l + 1 are in the same.
//
// With few tokens the time is that of loading codes: every quad loads its own, far ahead. With many tokens
// the block shares the codes. Rows beyond T or C and entries beyond E count as zeros.

#pragma once

#include "core/canonical.h"
#include "core/order.h"
#include "core/params.h"
#include "cuda/device.h"
#include "cuda/load.h"

namespace cu_fast {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;

// Adds the 16 partials of a quad, four per thread: l = 4 q .. 4 q + 3. All four threads get the sum. All
// lanes of the warp take part.
CU_FAST_DEVICE float quad_sum(const float (&partial)[4]) {
  float sum[4];
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    sum[l] = add(partial[l], shuffle_xor(partial[l], 2));
    sum[l] = add(sum[l], shuffle_xor(sum[l], 1));
  }
  return add(add(sum[0], sum[2]), add(sum[1], sum[3]));
}

// The key of code j (core/order.h) from its dot product; kEmpty if its score is not finite.
CU_FAST_DEVICE uint64_t key_of_dot(const SelectParams& p, float dot, int64_t j) {
  float score = dot;
  if (p.inv_norm != nullptr) score = multiply(score, p.inv_norm[j]);
  if (p.bias != nullptr) score = add(score, p.bias[j]);
  score = add(score, 0.0f);  // -0.0 becomes +0.0
  return is_finite(score) ? key_of(score, static_cast<int32_t>(j)) : kEmpty;
}

// Adds the products of a step of 16 entries, of which this thread has four.
CU_FAST_DEVICE void add_products(float (&partial)[4], float4 z, float4 c) {
  partial[0] = add(partial[0], multiply(z.x, c.x));
  partial[1] = add(partial[1], multiply(z.y, c.y));
  partial[2] = add(partial[2], multiply(z.z, c.z));
  partial[3] = add(partial[3], multiply(z.w, c.w));
}

// Adds the products of entries [first, first + 16 kLoads) of kM rows and code j. z(m, e) returns entries
// [e, e + 4) of row m.
template <int kM, int kLoads, class Z>
CU_FAST_DEVICE void add_steps(float (&partial)[kM][4], const Matrix& codes, bool fours, int64_t j,
                              int64_t first, int64_t E, const Z& z) {
  const int q = thread_index() % 4;
  uint4 raw[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) raw[i] = load_raw(codes, fours, j, first + i * kLanes + 4 * q, E);
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const float4 c = widen_four(raw[i], codes.dtype);
#pragma unroll
    for (int m = 0; m < kM; ++m) add_products(partial[m], z(m, first + i * kLanes + 4 * q), c);
  }
}

template <int kMTokens>
struct SomeTokens {
  static constexpr int kM = kMTokens, kN = 1;
  static constexpr int kTokens = kM, kCodes = kThreads / 4;
  static constexpr int kLoads = kM == 1 ? 12 : 8, kStep = kLoads * kLanes;
  static constexpr int kWidth = 4 * kThreads / kStep * kStep;  // whole steps, loaded at once

  struct Shared {
    alignas(16) float z[kM][kWidth];
  };

  // Token and code of pair (m, n) of this thread's quad.
  CU_FAST_DEVICE static int token(int m) { return m; }
  CU_FAST_DEVICE static int code(int) { return thread_index() / 4; }

  // dots[m][n] for the tokens from t0 and the codes from c0; all threads of a quad get them. Sets bit t of
  // *faulty (shared, zero before) if row t of z - pre holds NaN or Inf. If E > 0, all threads see it on
  // return.
  CU_FAST_DEVICE static void dots(const ScoreParams& p, int64_t t0, int64_t c0, Shared& shared,
                                  uint32_t* faulty, float (&dots)[kM][kN]) {
    const bool z_fours = reads_fours(p.z), codes_fours = reads_fours(p.codes);
    const int64_t j = c0 + code(0);
    float partial[kM][4] = {};
    for (int64_t first = 0; first < p.E; first += kWidth) {
      sync_block();  // the previous entries have been read
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int column = 4 * thread_index();
        if (column >= kWidth) continue;
        float4 z = make_float4(0, 0, 0, 0);
        if (t0 + m < p.T) z = load_centred(p.z, z_fours, p.pre, t0 + m, first + column, p.E);
        *reinterpret_cast<float4*>(&shared.z[m][column]) = z;
        if (!is_finite(z)) atomic_or(faulty, 1u << m);
      }
      sync_block();
      const auto z = [&](int m, int64_t e) {
        return *reinterpret_cast<const float4*>(&shared.z[m][e - first]);
      };
      for (int64_t e = first; e < first + kWidth && e < p.E && j < p.C; e += kStep) {
        add_steps<kM, kLoads>(partial, p.codes, codes_fours, j, e, p.E, z);
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) dots[m][0] = quad_sum(partial[m]);
  }
};

struct ManyTokens {
  static constexpr int kM = 4, kN = 4;
  static constexpr int kTokenQuads = 4, kCodeQuads = kThreads / 4 / kTokenQuads;
  static constexpr int kTokens = kM * kTokenQuads, kCodes = kN * kCodeQuads;
  // A row is 80 floats, 16 more than a multiple of the 32 banks: the two quads that a 128-bit read serves at
  // a time read different banks.
  static constexpr int kWidth = 64, kStride = kWidth + 16, kFours = kWidth / 4;
  static constexpr int kRows = kThreads / kFours;  // rows that the block loads at once
  static_assert(kTokens <= kRows && kCodes % kRows == 0,
                "a load covers the tokens, and whole shares of the codes");

  struct Shared {
    alignas(16) float rows[(kTokens + kCodes) * kStride];  // kTokens rows of z, then kCodes codes
  };

  CU_FAST_DEVICE static int token(int m) { return m * kTokenQuads + thread_index() / 4 % kTokenQuads; }
  CU_FAST_DEVICE static int code(int n) { return n * kCodeQuads + thread_index() / 4 / kTokenQuads; }

  // As SomeTokens::dots.
  CU_FAST_DEVICE static void dots(const ScoreParams& p, int64_t t0, int64_t c0, Shared& shared,
                                  uint32_t* faulty, float (&dots)[kM][kN]) {
    const bool z_fours = reads_fours(p.z), codes_fours = reads_fours(p.codes);
    // A thread loads the same four columns of every kRows-th row.
    const int row = thread_index() / kFours, column = thread_index() % kFours * 4;
    float partial[kM][kN][4] = {};
    for (int64_t first = 0; first < p.E; first += kWidth) {
      sync_block();  // the previous entries have been read
      uint4 codes[kCodes / kRows];
#pragma unroll
      for (int i = 0; i < kCodes / kRows; ++i) {
        const int64_t j = c0 + row + i * kRows;
        codes[i] = make_uint4(0, 0, 0, 0);
        if (j < p.C) codes[i] = load_raw(p.codes, codes_fours, j, first + column, p.E);
      }
      if (row < kTokens) {
        float4 z = make_float4(0, 0, 0, 0);
        if (t0 + row < p.T) z = load_centred(p.z, z_fours, p.pre, t0 + row, first + column, p.E);
        *reinterpret_cast<float4*>(shared.rows + row * kStride + column) = z;
        if (!is_finite(z)) atomic_or(faulty, 1u << row);
      }
#pragma unroll
      for (int i = 0; i < kCodes / kRows; ++i) {
        *reinterpret_cast<float4*>(shared.rows + (kTokens + row + i * kRows) * kStride + column) =
            widen_four(codes[i], p.codes.dtype);
      }
      sync_block();
      const int q = thread_index() % 4;
#pragma unroll 1  // more at a time would not fit the registers
      for (int e = 0; e < kWidth; e += kLanes) {
        float4 z[kM];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          z[m] = *reinterpret_cast<const float4*>(shared.rows + token(m) * kStride + e + 4 * q);
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float4 c =
              *reinterpret_cast<const float4*>(shared.rows + (kTokens + code(n)) * kStride + e + 4 * q);
#pragma unroll
          for (int m = 0; m < kM; ++m) add_products(partial[m][n], z[m], c);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) dots[m][n] = quad_sum(partial[m][n]);
    }
  }
};

// Calls use(token, code, dot) for every pair, in the first thread of its quad. If the quad shared them out,
// it would index dots by the thread, and the compiler would move dots to local memory.
template <class Tile, class Use>
CU_FAST_DEVICE void each_pair(const float (&dots)[Tile::kM][Tile::kN], const Use& use) {
  if (thread_index() % 4 != 0) return;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n) use(Tile::token(m), Tile::code(n), dots[m][n]);
  }
}

// Codes per tile, for any number of tokens.
inline constexpr int kTileCodes = 64;
static_assert(SomeTokens<1>::kCodes == kTileCodes && ManyTokens::kCodes == kTileCodes,
              "every tile of with_tile has kTileCodes = 64 codes");

// Calls run(tile) with the tile type for T tokens.
template <class Run>
void with_tile(int64_t T, const Run& run) {
  if (T == 1) {
    run(SomeTokens<1>());
  } else if (T <= 4) {
    run(SomeTokens<4>());
  } else {
    run(ManyTokens());
  }
}

}  // namespace cu_fast
