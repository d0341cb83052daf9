// Vec for AVX-512: 16 lanes in one register. What each operation does: vec_scalar.h.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/canonical.h"
#include "core/widen.h"
#include "cpu/simd.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX512)
namespace cu_fast::avx512 {

struct Vec {
  static constexpr int kTokens = 4, kCodes = 4;          // 16 sums: 16 of 32 registers
  static constexpr int kDeepTokens = 3, kDeepCodes = 8;  // 24 sums, 3 rows and a code: 28 of 32

  __m512 v;

  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }

  static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vec load(const Bf16* from) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits(from)), 16))};
  }
  static Vec load(const Half* from) { return {_mm512_cvtph_ps(bits(from))}; }
  static Vec load(const int32_t* from) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(from))}; }

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

  static void tree_sums(const Vec (&v)[1], float* out) {
    const __m256 eight =
        _mm256_add_ps(_mm512_castps512_ps256(v[0].v), _mm512_extractf32x8_ps(v[0].v, 1));  // l + (l+8)
    const __m128 four =
        _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));  // + (l+4)
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));                  // + (l+2)
    out[0] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));                   // + (l+1)
  }
  static void tree_sums(const Vec (&v)[4], float* out) {   // four trees at once, to share the shuffles
    const __m512 ab = folded<0x44, 0xee>(v[0].v, v[1].v);  // l + (l+8): 8 lanes of each
    const __m512 cd = folded<0x44, 0xee>(v[2].v, v[3].v);
    __m512 sum = folded<0x88, 0xdd>(ab, cd);                 // + (l+4): 4 lanes of each
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));  // + (l+2)
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));  // + (l+1)
    const __m512i every_fourth = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(every_fourth, sum)));
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

  Vec in_register() const {
    Vec r = *this;
    asm("" : "+v"(r.v));
    return r;
  }

  Vec relu() const {  // maxps returns its second operand if one is NaN
    return {_mm512_max_ps(_mm512_setzero_ps(), v)};
  }

 private:
  static __m256i bits(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  // The four-lane blocks of a and b that kFirst selects, plus those that kSecond selects.
  template <int kFirst, int kSecond>
  static __m512 folded(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, kFirst), _mm512_shuffle_f32x4(a, b, kSecond));
  }
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

struct Ints {
  static constexpr int kTokens = 6, kGroups = 4;  // 24 sums, 4 codes and a row: 29 of 32 registers
  static constexpr int kRange = 127;

  __m512i v;

  static Ints broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  void store(int32_t* to) const { _mm512_storeu_si512(to, v); }
  void add_products(Bytes codes, Bytes row) { v = _mm512_dpbusd_epi32(v, codes.v, row.v); }
};

}  // namespace cu_fast::avx512
CU_FAST_TARGET_END
