// The k best of n keys (core/order.h), sorted, by a block of kThreads.
//
//   what   shape     layout
//   keys   [n]       word_of(value(index)); kEmpty: none
//   into   [k] keys  best first, then kEmpty; shared or global memory
//
// 1. A radix select (cuda/kth_largest.h) finds what k of them reach. A pass costs three barriers; scores differ in
//    their first two or three bytes.
// 2. Those that reach it go into the list in any order: keys are unique, so there are k, or fewer if there are not
//    so many.
// 3. A bitonic sort. Pairs up to 32 apart stay in their warp, which then alone waits.

#pragma once

#include "core/order.h"
#include "cuda/kth_largest.h"

namespace cu_fast {

struct BestShared {
  KthShared kth;
  int32_t count;
};

// Sorts keys, the best first. k of them: as if kEmpty followed up to a power of two.
CU_FAST_DEVICE void sort_keys(uint64_t* keys, uint32_t k) {
#pragma unroll 1
  for (uint32_t half = 1; half < k; half *= 2) {
#pragma unroll 1
    for (uint32_t step = half; step > 0; step /= 2) {
#pragma unroll 1
      for (uint32_t pair = thread_index(); 2 * pair < k + step; pair += kThreads) {
        const uint32_t low = 2 * pair - (pair & (step - 1));
        // The first step compares with the mirror image, so that the better key is always the first.
        const uint32_t high = step == half ? low ^ (2 * half - 1) : low + step;
        if (high >= k) continue;
        const uint64_t a = keys[low], b = keys[high];
        if (a < b) keys[low] = b, keys[high] = a;
      }
      const uint32_t next = step > 1 ? step / 2 : 2 * half;
      if (step > 32 || next > 32) {
        sync_block();
      } else {
        sync_warp();
      }
    }
  }
  sync_block();
}

template <class Value>
CU_FAST_DEVICE void best_keys(int64_t n, int64_t k, const Value& value, uint64_t* into, BestShared& shared) {
  Words keys(n, value);
  const uint64_t least = kth_word<false>(keys, k, shared.kth);
  for (int64_t i = thread_index(); i < k; i += kThreads) into[i] = kEmpty;
  if (thread_index() == 0) shared.count = 0;
  sync_block();
  keys.each([&](uint64_t key) {
    if (key >= least) into[atomic_add(&shared.count, 1)] = key;
  });
  sync_block();
  sort_keys(into, static_cast<uint32_t>(k));
}

}  // namespace cu_fast
