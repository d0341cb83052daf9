// AMX: the vectors of AVX-512, and eight tiles of 16 rows of 64 bytes.

#pragma once

#include <cstdint>

#include "cpu/vec_avx512.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX512)
namespace cu_fast::amx {

using avx512::Bytes;
using avx512::Ints;
using avx512::keep_ids;
using avx512::Pair;
using avx512::store_ids;
using avx512::Vec;
using avx512::Words;

// While one exists, the thread's tiles are configured: all of them 16 rows of 64 bytes. Tiles have numbers, not names,
// and the compiler knows nothing of them. So all that is done with them is volatile assembly, in the order in which it
// is written. g++ 12's intrinsics do not say which memory is read and written.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Config kConfig;
    asm volatile("ldtilecfg %0" : : "m"(kConfig));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // Row r of the tile: 64 bytes at from + r * stride.
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  // sum[m][n] += the products of 64 bytes: row m of kRows, signed, and of kColumns the four of each of its 16 rows at n,
  // signed, or unsigned.
  template <int kSum, int kRows, int kColumns>
  static void add_products() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kRows), "i"(kColumns));
  }
  template <int kSum, int kRows, int kColumns>
  static void add_unsigned() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kRows), "i"(kColumns));
  }
};

// Sums of the products of digits, by the sum of their places: [5][16 codes][16 tokens] int32.
struct Levels {
  // to[token][code] = (or, unless first, +=) the levels of a pair, each 256 times the next.
  static void fold(const int32_t (*levels)[16][16], bool first, int64_t* to, int64_t to_stride) {
    for (int code = 0; code < 16; code += 8) {
      for (int token = 0; token < 16; token += 8) {
        __m512i sums[8], columns[8];
        for (int c = 0; c < 8; ++c) sums[c] = folded(levels, code + c, token);
        transpose(sums, columns);
        for (int t = 0; t < 8; ++t) {
          int64_t* const at = to + (token + t) * to_stride + code;
          _mm512_storeu_si512(at, first ? columns[t] : _mm512_add_epi64(columns[t], _mm512_loadu_si512(at)));
        }
      }
    }
  }

 private:
  static __m512i folded(const int32_t (*levels)[16][16], int code, int token) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 5
    for (int l = 0; l < 5; ++l) {
      const auto* const eight = reinterpret_cast<const __m256i*>(&levels[l][code][token]);
      sum = _mm512_add_epi64(_mm512_slli_epi64(sum, 8), _mm512_cvtepi32_epi64(_mm256_load_si256(eight)));
    }
    return sum;
  }

  static void transpose(const __m512i (&rows)[8], __m512i (&columns)[8]) {
    __m512i pairs[2][4];  // even and odd lanes of rows 2 i and 2 i + 1, in turns
    for (int i = 0; i < 4; ++i) {
      pairs[0][i] = _mm512_unpacklo_epi64(rows[2 * i], rows[2 * i + 1]);
      pairs[1][i] = _mm512_unpackhi_epi64(rows[2 * i], rows[2 * i + 1]);
    }
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i a = _mm512_shuffle_i64x2(pairs[odd][0], pairs[odd][1], 0x88),
                    b = _mm512_shuffle_i64x2(pairs[odd][0], pairs[odd][1], 0xdd),
                    c = _mm512_shuffle_i64x2(pairs[odd][2], pairs[odd][3], 0x88),
                    d = _mm512_shuffle_i64x2(pairs[odd][2], pairs[odd][3], 0xdd);
      columns[odd] = _mm512_shuffle_i64x2(a, c, 0x88);
      columns[2 + odd] = _mm512_shuffle_i64x2(b, d, 0x88);
      columns[4 + odd] = _mm512_shuffle_i64x2(a, c, 0xdd);
      columns[6 + odd] = _mm512_shuffle_i64x2(b, d, 0xdd);
    }
  }
};

}  // namespace cu_fast::amx
CU_FAST_TARGET_END
