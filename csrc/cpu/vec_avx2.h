// Vec for AVX2: 16 lanes in two registers. What each operation does: vec_scalar.h.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/canonical.h"
#include "core/widen.h"
#include "cpu/simd.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX2)
namespace cu_fast::avx2 {

struct Vec {
  static constexpr int kTokens = 4, kCodes = 1;  // 8 of 16 registers

  __m256 low, high;

  static Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

  static Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static Vec load(const Bf16* from) { return {widened(from), widened(from + 8)}; }
  static Vec load(const Half* from) { return {_mm256_cvtph_ps(bits(from)), _mm256_cvtph_ps(bits(from + 8))}; }

  void store(float* to) const {
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
  void store(Bf16* to) const {
    alignas(32) float lanes[kLanes];
    store(lanes);
    for (int l = 0; l < kLanes; ++l) narrow(lanes[l], to + l);
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

  Vec relu() const {  // maxps gives its second operand where one is NaN
    return {_mm256_max_ps(_mm256_setzero_ps(), low), _mm256_max_ps(_mm256_setzero_ps(), high)};
  }

 private:
  static __m128i bits(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
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

}  // namespace cu_fast::avx2
CU_FAST_TARGET_END
