// Vec for any machine: 16 lanes in plain C++. Its operations are the list that every level supplies.

#pragma once

#include <cstdint>

#include "core/canonical.h"
#include "core/widen.h"

namespace cu_fast::scalar {

struct Vec {
  // Rows of z and codes whose partials stay in registers together.
  static constexpr int kTokens = 1, kCodes = 1;

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

  template <class T>
  void store(T* to) const {
    for (int l = 0; l < kLanes; ++l) narrow(lane[l], to + l);
  }

  // out[i] = the 16 lanes of v[i], added as the canonical tree. Needed for one code and for kCodes.
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

}  // namespace cu_fast::scalar
