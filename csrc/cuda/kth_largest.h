// The k-th largest of n floats, by a block of kThreads: a radix select, 8 bits at a time.
//
// 1. Count, by their next 8 bits, the numbers that begin with the prefix found so far.
// 2. The first warp finds the digit that the k-th largest has, and appends it to the prefix.

#pragma once

#include <bit>

#include "cuda/device.h"
#include "cuda/fixed.h"

namespace cu_fast {

struct KthShared {
  int32_t count[256];
  uint32_t prefix;
  int32_t left;
};

// Maps floats to integers in the same order. NaN and -inf become 0.
CU_FAST_DEVICE uint32_t ordered(float x) {
  if (!(x >= -3.402823466e38f)) return 0;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

CU_FAST_DEVICE float from_ordered(uint32_t x) {
  return std::bit_cast<float>(x >> 31 ? x & 0x7fffffffu : ~x);
}

// The k-th largest of value(i), i in [0, n), returned to every thread of the block. NaN and -inf do not
// count; -inf if fewer than k are left.
template <class Value>
CU_FAST_DEVICE float kth_largest(int64_t n, int64_t k, const Value& value, KthShared& shared) {
  uint32_t prefix = 0;
  // The k-th largest is the left-th largest of those that begin with the prefix.
  int32_t left = static_cast<int32_t>(k);
  for (int shift = 24; shift >= 0; shift -= 8) {
    shared.count[thread_index()] = 0;
    sync_block();
    for (int64_t i = thread_index(); i < n; i += kThreads) {
      const uint32_t x = ordered(value(i));
      const bool begins = shift == 24 || x >> (shift + 8) == prefix >> (shift + 8);
      if (x != 0 && begins) atomic_add(&shared.count[x >> shift & 255], 1);
    }
    sync_block();
    if (warp_index() == 0) {
      // Each lane has 8 of the 256 counts. Higher lanes have the larger digits, which count first.
      int32_t mine = 0;
      for (int i = 0; i < 8; ++i) mine += shared.count[8 * lane_index() + i];
      int32_t from_here = mine;
      for (int step = 1; step < 32; step *= 2) {
        const int32_t above = shuffle(from_here, (lane_index() + step) % 32);
        if (lane_index() + step < 32) from_here += above;
      }
      const uint32_t reach = ballot(from_here >= left);
      if (reach == 0) {
        if (lane_index() == 0) shared.left = 0;
      } else if (lane_index() == 31 - count_leading_zeros(reach)) {
        int32_t rest = left - (from_here - mine);
        int digit = 8 * lane_index() + 7;
        while (shared.count[digit] < rest) rest -= shared.count[digit--];
        shared.prefix = prefix | static_cast<uint32_t>(digit) << shift;
        shared.left = rest;
      }
    }
    sync_block();
    left = shared.left;
    if (left == 0) return -INFINITY;
    prefix = shared.prefix;
  }
  return from_ordered(prefix);
}

}  // namespace cu_fast
