// Vec for any machine: 16 lanes in plain C++. Every level supplies the same operations.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/fixed.h"
#include "core/widen.h"
#include "cpu/grid.h"

namespace cu_fast::scalar {

struct Vec {
  static constexpr int kSums = 1;  // that stay in registers while a peak rate is measured (peak-inl.h)

  float lane[kLanes];

  static Vec broadcast(float x) {
    Vec r;
    for (float& lane : r.lane) lane = x;
    return r;
  }

  template <class T>
  static Vec load(const T* from) {
    Vec r;
    for (int l = 0; l < kLanes; ++l) r.lane[l] = widen(from[l]);
    return r;
  }

  static Vec load(const int32_t* from) {
    Vec r;
    for (int l = 0; l < kLanes; ++l) r.lane[l] = static_cast<float>(from[l]);
    return r;
  }
  static Vec load(const int64_t* from) {  // rounded once
    Vec r;
    for (int l = 0; l < kLanes; ++l) r.lane[l] = static_cast<float>(from[l]);
    return r;
  }

  template <class T>
  void store(T* to) const {
    for (int l = 0; l < kLanes; ++l) narrow(lane[l], to + l);
  }

  // Bit l: lane l of a is at least lane l of b; NaN never is.
  static uint32_t at_least(Vec a, Vec b) {
    uint32_t bits = 0;
    for (int l = 0; l < kLanes; ++l) bits |= uint32_t{a.lane[l] >= b.lane[l]} << l;
    return bits;
  }

  // Bit l: lane l of a is not below lane l of b; NaN never is.
  static uint32_t not_below(Vec a, Vec b) {
    uint32_t bits = 0;
    for (int l = 0; l < kLanes; ++l) bits |= uint32_t{!(a.lane[l] < b.lane[l])} << l;
    return bits;
  }

  // Stores the lanes whose bits are set, packed. May write 16 floats.
  void store_lanes(uint32_t lanes, float* to) const {
    for (; lanes != 0; lanes &= lanes - 1) *to++ = lane[std::countr_zero(lanes)];
  }

  Vec magnitude() const {
    Vec r;
    for (int l = 0; l < kLanes; ++l) r.lane[l] = std::fabs(lane[l]);
    return r;
  }

  // The nearest integer, ties to even; lanes must fit an int32.
  Vec nearest() const {
    Vec r;
    for (int l = 0; l < kLanes; ++l) r.lane[l] = std::nearbyint(lane[l]);
    return r;
  }

  // a > b ? a : b: if one is NaN, b.
  static Vec larger(Vec a, Vec b) {
    for (int l = 0; l < kLanes; ++l) a.lane[l] = a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l];
    return a;
  }

  // Stores the lanes as bytes; they must be integers in [-127, 127].
  void store_bytes(int8_t* to) const {
    for (int l = 0; l < kLanes; ++l) to[l] = static_cast<int8_t>(lane[l]);
  }

  // cut() of core/fixed.h.
  Vec cut() const {
    Vec r;
    for (int l = 0; l < kLanes; ++l) r.lane[l] = cu_fast::cut(lane[l]);
    return r;
  }

  // Lanes below zero become zero; NaN stays NaN.
  Vec relu() const {
    Vec r;
    for (int l = 0; l < kLanes; ++l) r.lane[l] = lane[l] < 0 ? 0 : lane[l];
    return r;
  }

  friend Vec operator+(Vec a, Vec b) {
    for (int l = 0; l < kLanes; ++l) a.lane[l] += b.lane[l];
    return a;
  }
  friend Vec operator-(Vec a, Vec b) {
    for (int l = 0; l < kLanes; ++l) a.lane[l] -= b.lane[l];
    return a;
  }
  friend Vec operator*(Vec a, Vec b) {
    for (int l = 0; l < kLanes; ++l) a.lane[l] *= b.lane[l];
    return a;
  }
  friend Vec operator/(Vec a, Vec b) {
    for (int l = 0; l < kLanes; ++l) a.lane[l] /= b.lane[l];
    return a;
  }
};

// Stores first + l for each lane l whose bit is set, packed. May write 16 of them.
inline void store_ids(uint32_t lanes, int32_t first, int32_t* to) {
  for (; lanes != 0; lanes &= lanes - 1) *to++ = first + std::countr_zero(lanes);
}

// Stores from[l] for each such lane l. May write 16 of them; `to` may be before `from` in the same array.
inline void keep_ids(uint32_t lanes, const int32_t* from, int32_t* to) {
  for (; lanes != 0; lanes &= lanes - 1) *to++ = from[std::countr_zero(lanes)];
}

// 64 bytes: four entries of each of 16 codes, or four entries of a row of z, 16 times.
struct Bytes {
  int16_t byte[4 * kLanes];

  static Bytes load(const uint8_t* from) {
    Bytes r;
    for (int i = 0; i < 4 * kLanes; ++i) r.byte[i] = from[i];
    return r;
  }
  static Bytes repeat(const int8_t* from) {
    Bytes r;
    for (int i = 0; i < 4 * kLanes; ++i) r.byte[i] = from[i % 4];
    return r;
  }
};

// Words of two columns of each of 16 codes, or of a row of x, 16 times.
struct Words {
  int16_t word[2 * kLanes];

  static Words load(const int16_t* from) {
    Words r;
    for (int i = 0; i < 2 * kLanes; ++i) r.word[i] = from[i];
    return r;
  }
  // Not read from memory again where it is used.
  static Words repeat(const int16_t* from) {
    Words r;
    for (int i = 0; i < 2 * kLanes; ++i) r.word[i] = from[i % 2];
    return r;
  }
  friend Words operator+(Words a, Words b) {
    for (int i = 0; i < 2 * kLanes; ++i) a.word[i] = static_cast<int16_t>(a.word[i] + b.word[i]);
    return a;
  }

  // 16 rows of 32 words, `stride` apart, become 16 rows of two words of each, to_stride apart.
  static void transpose(const int16_t* from, int64_t stride, int16_t* to, int64_t to_stride) {
    for (int c = 0; c < kLanes; ++c) {
      for (int i = 0; i < kLanes; ++i)
        __builtin_memcpy(to + i * to_stride + 2 * c, from + c * stride + 2 * i, 4);
    }
  }
};

// 16 sums of products of bytes or words.
struct Ints {
  // Rows of z and groups of 16 codes whose sums stay in registers together.
  static constexpr int kTokens = 1, kGroups = 1;
  static constexpr int kRange = 127;  // the largest magnitude of a row's bytes
  // Rows of x and groups of 16 codes that the tile of cpu/fixed-inl.h multiplies together.
  static constexpr int kTileTokens = 1, kTileGroups = 1;

  uint32_t lane[kLanes];  // unsigned, so that it wraps

  static Ints broadcast(int32_t x) {
    Ints r;
    for (uint32_t& lane : r.lane) lane = x;
    return r;
  }
  void store(int32_t* to) const {
    for (int l = 0; l < kLanes; ++l) to[l] = static_cast<int32_t>(lane[l]);
  }
  void add_products(Bytes codes, Bytes row) {
    for (int i = 0; i < 4 * kLanes; ++i) lane[i / 4] += int32_t{codes.byte[i]} * row.byte[i];
  }
  void add_products(Words codes, Words row) {
    for (int i = 0; i < 2 * kLanes; ++i) lane[i / 2] += int32_t{codes.word[i]} * row.word[i];
  }

  // to[l] = high 2^24 + (both - high - low) 2^12 + low, or that more than it was. `both` may have wrapped.
  static void fold(Ints high, Ints low, Ints both, bool first, int64_t* to) {
    for (int l = 0; l < kLanes; ++l) {
      const int64_t a = static_cast<int32_t>(high.lane[l]), b = static_cast<int32_t>(low.lane[l]);
      const int64_t middle = static_cast<int32_t>(both.lane[l] - high.lane[l] - low.lane[l]);
      to[l] = (first ? 0 : to[l]) + a * (1 << 24) + middle * (1 << 12) + b;
    }
  }
};

// Rows of x against rows of weights as they lie in memory: <q, p> of four pairs. `x` has place for 3 width words.
// With more than kFewTokens rows of x, a tile of weights is cut into words once for all of them.
struct Pair {
  static constexpr int64_t kFewTokens =
      kBlockTokens;  // a compiler makes more of these loops than of the tile's

  static void cut(const float* q, int64_t width, int16_t* x) {  // as cut_words of cpu/fixed-inl.h
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
    int64_t sum = 0;
    for (int64_t e = 0; e < width; e += 64) {
      int16_t p1[64], p0[64];
      for (int i = 0; i < 64; ++i) {
        const int8_t *const d0 = code + e, *const d1 = d0 + width, *const d2 = d1 + width;
        const auto upper = static_cast<int16_t>((d1[i] + 8) >> 4);
        p1[i] = static_cast<int16_t>(16 * d0[i] + upper);
        p0[i] = static_cast<int16_t>(256 * (d1[i] - 16 * upper) + d2[i]);
      }
      const int16_t *const q1 = x + e, *const q0 = q1 + width;
      sum += int64_t{products(q1, p1)} * (1 << 24) + products(q0, p0);
      sum += int64_t{products(q1, p0) + products(q0, p1)} * (1 << 12);
    }
    return sum;
  }
  static int32_t products(const int16_t* a, const int16_t* b) {
    int32_t sum = 0;
    for (int i = 0; i < 64; ++i) sum += a[i] * b[i];
    return sum;
  }
};

// What a CPU's matrix tiles need while they are used (vec_amx.h): nothing, where there are none.
struct Tiles {};

}  // namespace cu_fast::scalar
