// Vec for any machine: 16 lanes in plain C++. Every level supplies the same operations.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/canonical.h"
#include "core/widen.h"

namespace cu_fast::scalar {

struct Vec {
  // Rows of z and codes whose partials stay in registers together.
  static constexpr int kTokens = 1, kCodes = 1;
  // The same where the codes stay in the L1 cache and the rows come from the L2.
  static constexpr int kDeepTokens = 1, kDeepCodes = 2;

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

  template <class T>
  void store(T* to) const {
    for (int l = 0; l < kLanes; ++l) narrow(lane[l], to + l);
  }

  // out[i] = the 16 lanes of v[i], added as the canonical tree. Called with 1 and with kCodes vectors.
  static void tree_sums(const Vec (&v)[1], float* out) {
    Vec partial = v[0];
    out[0] = tree_sum(partial.lane);
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

  // The same; not read from memory again where it is used.
  Vec in_register() const { return *this; }

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

// 16 sums of byte products.
struct Ints {
  // Rows of z and groups of 16 codes whose sums stay in registers together.
  static constexpr int kTokens = 1, kGroups = 1;
  static constexpr int kRange = 127;  // the largest magnitude of a row's bytes

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
};

}  // namespace cu_fast::scalar
