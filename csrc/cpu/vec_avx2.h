// Vec for AVX2: 16 lanes in two registers. What each operation does: vec_scalar.h.

#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

#include "core/canonical.h"
#include "core/widen.h"
#include "cpu/simd.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX2)
namespace cu_fast::avx2 {

struct Vec {
  static constexpr int kTokens = 4, kCodes = 1;          // 4 sums of two registers each: 8 of 16
  static constexpr int kDeepTokens = 2, kDeepCodes = 2;  // likewise

  __m256 low, high;

  static Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

  static Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static Vec load(const Bf16* from) { return {widened(from), widened(from + 8)}; }
  static Vec load(const Half* from) { return {_mm256_cvtph_ps(bits(from)), _mm256_cvtph_ps(bits(from + 8))}; }
  static Vec load(const int32_t* from) {
    const auto* in = reinterpret_cast<const __m256i*>(from);
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(in)), _mm256_cvtepi32_ps(_mm256_loadu_si256(in + 1))};
  }

  void store(float* to) const {
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
  void store(Bf16* to) const {
    const __m256i halves = _mm256_packus_epi32(narrowed(low), narrowed(high));
    // packus works within 128-bit halves: restore the order.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(halves, 0xd8));
  }
  void store(Half* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
  }

  static void tree_sums(const Vec (&v)[1], float* out) {
    const __m256 eight = _mm256_add_ps(v[0].low, v[0].high);  // l + (l+8)
    const __m128 four =
        _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));  // + (l+4)
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));                  // + (l+2)
    out[0] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));                   // + (l+1)
  }

  static uint32_t at_least(Vec a, Vec b) {
    const uint32_t low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ));
    const uint32_t high = _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
    return low | high << 8;
  }

  static uint32_t not_below(Vec a, Vec b) {
    const uint32_t low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_NLT_UQ));
    const uint32_t high = _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_NLT_UQ));
    return low | high << 8;
  }

  void store_lanes(uint32_t lanes, float* to) const {
    float all[kLanes];
    store(all);
    for (; lanes != 0; lanes &= lanes - 1) *to++ = all[std::countr_zero(lanes)];
  }

  Vec magnitude() const {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, low), _mm256_andnot_ps(sign, high)};
  }
  Vec nearest() const {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(low, kMode), _mm256_round_ps(high, kMode)};
  }
  static Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  void store_bytes(int8_t* to) const {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);  // packs works within halves
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
  }

  Vec in_register() const {
    Vec r = *this;
    asm("" : "+x"(r.low), "+x"(r.high));
    return r;
  }

  Vec relu() const {  // maxps returns its second operand if one is NaN
    return {_mm256_max_ps(_mm256_setzero_ps(), low), _mm256_max_ps(_mm256_setzero_ps(), high)};
  }

 private:
  static __m128i bits(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  static __m256i narrowed(__m256 v) {  // narrow() of core/widen.h, in 32-bit lanes
    const __m256i all = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(all, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(all, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  }
  static __m256 widened(const Bf16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits(from)), 16));
  }
};

inline Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}

inline void store_ids(uint32_t lanes, int32_t first, int32_t* to) {
  for (; lanes != 0; lanes &= lanes - 1) *to++ = first + std::countr_zero(lanes);
}

inline void keep_ids(uint32_t lanes, const int32_t* from, int32_t* to) {
  for (; lanes != 0; lanes &= lanes - 1) *to++ = from[std::countr_zero(lanes)];
}

struct Bytes {
  __m256i low, high;

  static Bytes load(const uint8_t* from) {
    const auto* in = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(in), _mm256_loadu_si256(in + 1)};
  }
  static Bytes repeat(const int8_t* from) {
    int32_t four;
    __builtin_memcpy(&four, from, 4);
    const __m256i v = _mm256_set1_epi32(four);
    return {v, v};
  }
};

struct Ints {
  static constexpr int kTokens = 2, kGroups = 2;  // 4 sums of two registers each: 8 of 16
  // vpmaddubsw saturates at 2^15 - 1; two products of at most 255 * 64 are below it.
  static constexpr int kRange = 64;

  __m256i low, high;

  static Ints broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  void store(int32_t* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), high);
  }
  void add_products(Bytes codes, Bytes row) {
    low = _mm256_add_epi32(low, products(codes.low, row.low));
    high = _mm256_add_epi32(high, products(codes.high, row.high));
  }

 private:
  static __m256i products(__m256i codes, __m256i row) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, row), _mm256_set1_epi16(1));
  }
};

}  // namespace cu_fast::avx2
CU_FAST_TARGET_END
