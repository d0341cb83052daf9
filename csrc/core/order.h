// The total order of selection as one integer: a better code has the larger key.
//
//   key = [ score, as an unsigned number that grows with it : 32 | ~id : 32 ]
//
// Higher score first, equal scores: smaller id first. Scores are finite and never -0.0 (score + 0.0f).

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>

#include "core/portable.h"

namespace cu_fast {

// An empty place in a list: below the key of every code.
inline constexpr uint64_t kEmpty = 0;
// Marks the list of a row that holds NaN or Inf. Above the key of every code, so no code can enter the list;
// its score is NaN.
inline constexpr uint64_t kPoison = ~uint64_t{0};

CU_FAST_BOTH inline uint64_t key_of(float score, int32_t id) {
  const uint32_t bits = std::bit_cast<uint32_t>(score);
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | ~static_cast<uint32_t>(id);
}

CU_FAST_BOTH inline float score_of(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

CU_FAST_BOTH inline int32_t id_of(uint64_t key) {
  return static_cast<int32_t>(~static_cast<uint32_t>(key));
}

// The best codes seen so far: a heap of fixed size with the worst key on top, O(log capacity) per code. It
// starts full of kEmpty, which every code beats.
struct KeyHeap {
  uint64_t* keys;
  int64_t capacity;

  void clear(bool poisoned) {
    std::fill_n(keys, capacity, kEmpty);
    if (poisoned) keys[0] = kPoison;
  }

  void push(uint64_t key) {
    if (key <= keys[0]) return;
    std::pop_heap(keys, keys + capacity, std::greater<>());
    keys[capacity - 1] = key;
    std::push_heap(keys, keys + capacity, std::greater<>());
  }

  // Scores below this cannot enter the heap. Lowest float while the heap is not full. NaN for a row that
  // holds NaN or Inf, so that no comparison holds.
  float threshold() const {
    return keys[0] == kEmpty ? std::numeric_limits<float>::lowest() : score_of(keys[0]);
  }
};

}  // namespace cu_fast
