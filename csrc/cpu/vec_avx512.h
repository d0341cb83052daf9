// Vec for AVX-512: 16 lanes in one register. What each operation does: vec_scalar.h.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/fixed.h"
#include "core/widen.h"
#include "cpu/simd.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX512)
namespace cu_fast::avx512 {

struct Vec {
  static constexpr int kSums = 16;

  __m512 v;

  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }

  static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vec load(const Bf16* from) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits(from)), 16))};
  }
  static Vec load(const Half* from) { return {_mm512_cvtph_ps(bits(from))}; }
  static Vec load(const int32_t* from) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(from))}; }
  static Vec load(const int64_t* from) {
    return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtepi64_ps(_mm512_loadu_si512(from))),
                               _mm512_cvtepi64_ps(_mm512_loadu_si512(from + 8)), 1)};
  }

  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store(Bf16* to) const {  // narrow() of core/widen.h
    const __m512i all = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(all, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(all, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
  }
  void store(Half* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static uint32_t at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }

  static uint32_t not_below(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ); }

  void store_lanes(uint32_t lanes, float* to) const {  // in a register: vcompressps to memory is far slower
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), v));
  }

  Vec magnitude() const { return {_mm512_abs_ps(v)}; }
  Vec nearest() const { return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  void store_bytes(int8_t* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  Vec cut() const {
    return {
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(kLeast), _CMP_NLT_UQ), v)};
  }

  Vec relu() const {  // maxps returns its second operand if one is NaN
    return {_mm512_max_ps(_mm512_setzero_ps(), v)};
  }

 private:
  static __m256i bits(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
};

inline Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline Vec operator/(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}

inline void store_ids(uint32_t lanes, int32_t first, int32_t* to) {
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(first), count);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), ids));
}

inline void keep_ids(uint32_t lanes, const int32_t* from, int32_t* to) {
  _mm512_storeu_si512(to,
                      _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), _mm512_loadu_si512(from)));
}

struct Bytes {
  __m512i v;

  static Bytes load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
  static Bytes repeat(const int8_t* from) {
    int32_t four;
    __builtin_memcpy(&four, from, 4);
    return {_mm512_set1_epi32(four)};
  }
};

struct Words {
  __m512i v;

  static Words load(const int16_t* from) { return {_mm512_loadu_si512(from)}; }
  static Words repeat(const int16_t* from) {
    int32_t two;
    __builtin_memcpy(&two, from, 4);
    Words r = {_mm512_set1_epi32(two)};
    asm("" : "+v"(r.v));
    return r;
  }

  static void transpose(const int16_t* from, int64_t stride, int16_t* to, int64_t to_stride) {
    __m512i a[16], b[16];
    for (int c = 0; c < 16; ++c) a[c] = _mm512_loadu_si512(from + c * stride);
    // Each step exchanges one bit of the row's number with one of the lane's: 1, 2, then 4 and 8.
    for (int c = 0; c < 16; c += 2) {
      b[c] = _mm512_unpacklo_epi32(a[c], a[c + 1]);
      b[c + 1] = _mm512_unpackhi_epi32(a[c], a[c + 1]);
    }
    for (int c = 0; c < 16; c += 4) {
      for (int i = 0; i < 2; ++i) {
        a[c + 2 * i] = _mm512_unpacklo_epi64(b[c + i], b[c + 2 + i]);
        a[c + 2 * i + 1] = _mm512_unpackhi_epi64(b[c + i], b[c + 2 + i]);
      }
    }
    for (int i = 0; i < 4; ++i) {  // a[4 g + i]: lanes i, 4 + i, 8 + i, 12 + i of rows 4 g to 4 g + 3
      const __m512i even = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88),
                    odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd),
                    even2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88),
                    odd2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
      _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(even, even2, 0x88));
      _mm512_storeu_si512(to + (4 + i) * to_stride, _mm512_shuffle_i32x4(odd, odd2, 0x88));
      _mm512_storeu_si512(to + (8 + i) * to_stride, _mm512_shuffle_i32x4(even, even2, 0xdd));
      _mm512_storeu_si512(to + (12 + i) * to_stride, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
    }
  }
};

inline Words operator+(Words a, Words b) {
  return {_mm512_add_epi16(a.v, b.v)};
}

struct Ints {
  static constexpr int kTileTokens = 4, kTileGroups = 2;  // 24 sums, 4 of codes and a row: 29 of 32 registers
  static constexpr int kTokens = 6, kGroups = 4;          // 24 sums, 4 codes and a row: 29 of 32 registers
  static constexpr int kRange = 127;

  __m512i v;

  static Ints broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  void store(int32_t* to) const { _mm512_storeu_si512(to, v); }
  void add_products(Bytes codes, Bytes row) { v = _mm512_dpbusd_epi32(v, codes.v, row.v); }
  // Not as an intrinsic: g++ 12 copies its sums, and runs out of registers.
  void add_products(Words codes, Words row) {
    asm("vpdpwssd %2, %1, %0" : "+v"(v) : "v"(codes.v), "v"(row.v));
  }

  static void fold(Ints high, Ints low, Ints both, bool first, int64_t* to) {
    const __m512i middle = _mm512_sub_epi32(_mm512_sub_epi32(both.v, high.v), low.v);
    fold_half(_mm512_castsi512_si256(high.v), _mm512_castsi512_si256(middle), _mm512_castsi512_si256(low.v),
              first, to);
    fold_half(_mm512_extracti64x4_epi64(high.v, 1), _mm512_extracti64x4_epi64(middle, 1),
              _mm512_extracti64x4_epi64(low.v, 1), first, to + 8);
  }

 private:
  static void fold_half(__m256i high, __m256i middle, __m256i low, bool first, int64_t* to) {
    const __m512i upper =
        _mm512_add_epi64(_mm512_slli_epi64(_mm512_cvtepi32_epi64(high), 12), _mm512_cvtepi32_epi64(middle));
    const __m512i sum = _mm512_add_epi64(_mm512_slli_epi64(upper, 12), _mm512_cvtepi32_epi64(low));
    _mm512_storeu_si512(to, first ? sum : _mm512_add_epi64(_mm512_loadu_si512(to), sum));
  }
};

// The nine products of digits. Those of the weights plus 128 are unsigned, as vpdpbusd takes them; what that adds is
// a multiple of the sum of q. `x` holds the digits of q, of 64 columns at a time, then what to
// take away.
struct Pair {
  static constexpr int64_t kFewTokens = 8;

  static void cut(const float* q, int64_t width, int16_t* x) {
    auto* const digits = reinterpret_cast<int8_t*>(x);
    int64_t sum = 0;
    for (int64_t e = 0; e < width; e += 64) {
      int8_t* const block = digits + 3 * e;
      for (int64_t i = 0; i < 64; ++i) {
        const auto whole = static_cast<int32_t>(q[e + i]);
        block[i] = static_cast<int8_t>((whole + 0x8080) >> 16);
        block[64 + i] = static_cast<int8_t>((whole + 0x80) >> 8);
        block[128 + i] = static_cast<int8_t>(whole);
        sum += whole;
      }
    }
    sum *= 0x808080;
    __builtin_memcpy(digits + 3 * width, &sum, sizeof sum);
  }

  [[gnu::noinline]] static void dots(const int16_t* const (&x)[4], const int8_t* const (&codes)[4],
                                     int64_t width, int64_t* sums) {
    const __m512i offset = _mm512_set1_epi8(-128);
    // Digits i and j of pair n: level i + j. A lane stays below 2^31 / 5.
    __m512i level[5][4];
#pragma GCC unroll 5
    for (int l = 0; l < 5; ++l) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) level[l][n] = _mm512_setzero_si512();
    }
    for (int64_t e = 0; e < width; e += 64) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const auto* const digits = reinterpret_cast<const int8_t*>(x[n]) + 3 * e;
        const __m512i q0 = _mm512_loadu_si512(digits), q1 = _mm512_loadu_si512(digits + 64),
                      q2 = _mm512_loadu_si512(digits + 128);
        const __m512i p0 = _mm512_xor_si512(_mm512_loadu_si512(codes[n] + e), offset),
                      p1 = _mm512_xor_si512(_mm512_loadu_si512(codes[n] + width + e), offset),
                      p2 = _mm512_xor_si512(_mm512_loadu_si512(codes[n] + 2 * width + e), offset);
        add_bytes(level[0][n], p0, q0);
        add_bytes(level[1][n], p0, q1);
        add_bytes(level[2][n], p0, q2);
        add_bytes(level[1][n], p1, q0);
        add_bytes(level[2][n], p1, q1);
        add_bytes(level[3][n], p1, q2);
        add_bytes(level[2][n], p2, q0);
        add_bytes(level[3][n], p2, q1);
        add_bytes(level[4][n], p2, q2);
      }
    }
    __m512i all[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 5
    for (int l = 0; l < 5; ++l) {
      const __m512i four = folded(folded(level[l][0], level[l][1]), folded(level[l][2], level[l][3]));
      all[0] =
          _mm512_add_epi64(_mm512_slli_epi64(all[0], 8), _mm512_cvtepi32_epi64(_mm512_castsi512_si256(four)));
      all[1] = _mm512_add_epi64(_mm512_slli_epi64(all[1], 8),
                                _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(four, 1)));
    }
    alignas(64) int64_t lanes[16];
    _mm512_store_si512(lanes, all[0]);
    _mm512_store_si512(lanes + 8, all[1]);
    for (int n = 0; n < 4; ++n) {
      const int64_t* const four = lanes + 4 * n;
      int64_t excess;
      __builtin_memcpy(&excess, reinterpret_cast<const int8_t*>(x[n]) + 3 * width, sizeof excess);
      sums[n] = (four[0] + four[1]) + (four[2] + four[3]) - excess;
    }
  }

 private:
  static void add_bytes(__m512i& sum, __m512i p, __m512i q) {  // as in Ints
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(p), "v"(q));
  }
  // Lanes 128 bits apart: the sums of two of a, then of two of b.
  static __m512i folded(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  }
};

struct Tiles {};

}  // namespace cu_fast::avx512
CU_FAST_TARGET_END
