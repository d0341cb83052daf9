// Vec for AVX2: 16 lanes in two registers. What each operation does: vec_scalar.h.

#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

#include "core/fixed.h"
#include "core/widen.h"
#include "cpu/simd.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX2)
namespace cu_fast::avx2 {

struct Vec {
  static constexpr int kSums = 4;

  __m256 low, high;

  static Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

  static Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static Vec load(const Bf16* from) { return {widened(from), widened(from + 8)}; }
  static Vec load(const Half* from) { return {_mm256_cvtph_ps(bits(from)), _mm256_cvtph_ps(bits(from + 8))}; }
  static Vec load(const int32_t* from) {
    const auto* in = reinterpret_cast<const __m256i*>(from);
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(in)), _mm256_cvtepi32_ps(_mm256_loadu_si256(in + 1))};
  }

  static Vec load(const int64_t* from) {  // there is no vector instruction that rounds once
    float lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = static_cast<float>(from[l]);
    return load(lanes);
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

  Vec cut() const {
    const __m256 least = _mm256_set1_ps(kLeast);
    const Vec size = magnitude();
    return {_mm256_and_ps(low, _mm256_cmp_ps(size.low, least, _CMP_NLT_UQ)),
            _mm256_and_ps(high, _mm256_cmp_ps(size.high, least, _CMP_NLT_UQ))};
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

struct Words {
  __m256i low, high;

  static Words load(const int16_t* from) {
    const auto* in = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(in), _mm256_loadu_si256(in + 1)};
  }
  static Words repeat(const int16_t* from) {
    int32_t two;
    __builtin_memcpy(&two, from, 4);
    __m256i v = _mm256_set1_epi32(two);
    asm("" : "+x"(v));
    return {v, v};
  }
  static void transpose(const int16_t* from, int64_t stride, int16_t* to, int64_t to_stride) {
    for (int c = 0; c < kLanes; c += 8) {
      for (int i = 0; i < kLanes; i += 8)
        transpose_eight(from + c * stride + 2 * i, stride, to + i * to_stride + 2 * c, to_stride);
    }
  }

 private:
  static void transpose_eight(const int16_t* from, int64_t stride, int16_t* to, int64_t to_stride) {
    __m256i a[8], b[8];
    for (int c = 0; c < 8; ++c)
      a[c] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + c * stride));
    for (int c = 0; c < 8; c += 2) {
      b[c] = _mm256_unpacklo_epi32(a[c], a[c + 1]);
      b[c + 1] = _mm256_unpackhi_epi32(a[c], a[c + 1]);
    }
    for (int c = 0; c < 8; c += 4) {
      for (int i = 0; i < 2; ++i) {
        a[c + 2 * i] = _mm256_unpacklo_epi64(b[c + i], b[c + 2 + i]);
        a[c + 2 * i + 1] = _mm256_unpackhi_epi64(b[c + i], b[c + 2 + i]);
      }
    }
    for (int i = 0; i < 4; ++i) {  // a[4 g + i]: lanes i and 4 + i of rows 4 g to 4 g + 3
      auto* const row = reinterpret_cast<__m256i*>(to + i * to_stride);
      auto* const other = reinterpret_cast<__m256i*>(to + (4 + i) * to_stride);
      _mm256_storeu_si256(row, _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
      _mm256_storeu_si256(other, _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
    }
  }
};

inline Words operator+(Words a, Words b) {
  return {_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high)};
}

struct Ints {
  static constexpr int kTileTokens = 2, kTileGroups = 1;  // 6 sums of two registers each: 12 of 16
  static constexpr int kTokens = 2, kGroups = 2;          // 4 sums of two registers each: 8 of 16
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
  void add_products(Words codes, Words row) {
    add_words(low, codes.low, row.low);
    add_words(high, codes.high, row.high);
  }

  static void fold(Ints high, Ints low, Ints both, bool first, int64_t* to) {
    fold_half(high.low, low.low, both.low, first, to);
    fold_half(high.high, low.high, both.high, first, to + 8);
  }

 private:
  // As one, so that the compiler does not run out of registers for products that wait to be added.
  static void add_words(__m256i& sum, __m256i codes, __m256i row) {
    __m256i products;
    asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "xm"(codes), "x"(row));
  }
  static void fold_half(__m256i high, __m256i low, __m256i both, bool first, int64_t* to) {
    const __m256i middle = _mm256_sub_epi32(_mm256_sub_epi32(both, high), low);
    fold_quarter(_mm256_castsi256_si128(high), _mm256_castsi256_si128(middle), _mm256_castsi256_si128(low),
                 first, to);
    fold_quarter(_mm256_extracti128_si256(high, 1), _mm256_extracti128_si256(middle, 1),
                 _mm256_extracti128_si256(low, 1), first, to + 4);
  }
  static void fold_quarter(__m128i high, __m128i middle, __m128i low, bool first, int64_t* to) {
    auto* const sums = reinterpret_cast<__m256i*>(to);
    const __m256i upper =
        _mm256_add_epi64(_mm256_slli_epi64(_mm256_cvtepi32_epi64(high), 12), _mm256_cvtepi32_epi64(middle));
    const __m256i sum = _mm256_add_epi64(_mm256_slli_epi64(upper, 12), _mm256_cvtepi32_epi64(low));
    _mm256_storeu_si256(sums, first ? sum : _mm256_add_epi64(_mm256_loadu_si256(sums), sum));
  }
  static __m256i products(__m256i codes, __m256i row) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, row), _mm256_set1_epi16(1));
  }
};

// q = 4096 q1 + q0 and p = 256 (256 d0 + d1) + d2: four products of words.
struct Pair {
  static constexpr int64_t kFewTokens = 3;

  static void cut(const float* q, int64_t width, int16_t* x) {
    for (int64_t e = 0; e < width; ++e) {
      const auto whole = static_cast<int32_t>(q[e]), high = (whole + 2048) >> 12;
      x[e] = static_cast<int16_t>(high);
      x[width + e] = static_cast<int16_t>(whole - (high << 12));
    }
  }

  static void dots(const int16_t* const (&x)[4], const int8_t* const (&codes)[4], int64_t width,
                   int64_t* sums) {
    for (int n = 0; n < 4; ++n) sums[n] = dot(x[n], codes[n], width);
  }

 private:
  static int64_t dot(const int16_t* x, const int8_t* code, int64_t width) {
    // Two products of 2048 * 32,640 in a lane per step: 16 steps fit.
    constexpr int64_t kFold = 256;
    const __m256i zero = _mm256_setzero_si256();
    __m256i sum = zero;
    for (int64_t begin = 0; begin < width; begin += kFold) {
      __m256i high = zero, middle = zero, low = zero, lowest = zero;
      const int64_t end = begin + kFold < width ? begin + kFold : width;
      for (int64_t e = begin; e < end; e += 16) {
        const __m256i upper =
            _mm256_add_epi16(_mm256_slli_epi16(widened(code + e), 8), widened(code + width + e));
        const __m256i lower = widened(code + 2 * width + e);
        const __m256i q1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + e));
        const __m256i q0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + width + e));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(q1, upper));
        middle = _mm256_add_epi32(middle, _mm256_madd_epi16(q1, lower));
        low = _mm256_add_epi32(low, _mm256_madd_epi16(q0, upper));
        lowest = _mm256_add_epi32(lowest, _mm256_madd_epi16(q0, lower));
      }
      sum = _mm256_add_epi64(sum, _mm256_slli_epi64(pairs_of(high), 20));
      sum = _mm256_add_epi64(sum, _mm256_slli_epi64(pairs_of(middle), 12));
      sum = _mm256_add_epi64(sum, _mm256_slli_epi64(pairs_of(low), 8));
      sum = _mm256_add_epi64(sum, pairs_of(lowest));
    }
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    return _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1);
  }
  static __m256i widened(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static __m256i pairs_of(__m256i v) {  // sums of lanes l and l + 4
    return _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                            _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
  }
};

struct Tiles {};

}  // namespace cu_fast::avx2
CU_FAST_TARGET_END
