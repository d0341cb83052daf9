// The best keys (core/order.h) that a warp has seen: a sorted list of k, and a queue.
//
//   what   shape          layout
//   list   [k] keys       sorted, best first, `stride` apart; shared or global memory
//   queue  [kQueue] keys  unsorted; shared memory
//
// 1. push   Lanes whose key is above the worst of the list append it to the queue. It costs a ballot.
// 2. merge  When the queue is full it is sorted in registers. Every key of the list moves back by the number
//           of queued keys above it, and the queued keys fill the gaps. This goes from the end of the list to
//           its front, 32 keys at a time, so that it works in place; it stops where nothing moves.
//
// The order is total, so neither the order of the pushes nor the time of the merges changes the result.

#pragma once

#include "core/order.h"
#include "cuda/device.h"

namespace cu_fast {

inline constexpr int kQueue = 32;

class TopList {
 public:
  // list: places for k keys, `stride` apart, sorted or empty; queue: shared, kQueue keys. All lanes pass the
  // same.
  CU_FAST_DEVICE TopList(uint64_t* list, int64_t stride, int64_t k, uint64_t* queue)
      : list_(list), stride_(stride), k_(k), queue_(queue), worst_(list[(k - 1) * stride]) {}

  // Makes an empty list of k places.
  CU_FAST_DEVICE static void clear(uint64_t* list, int64_t stride, int64_t k) {
    for (int64_t i = lane_index(); i < k; i += 32) list[i * stride] = kEmpty;
    sync_warp();
  }

  // Offers one key per lane (kEmpty: none).
  CU_FAST_DEVICE void push(uint64_t key) {
    uint32_t better = ballot(key > worst_);
    if (better == 0) return;
    if (queued_ + count_bits(better) > kQueue) {
      merge();
      better = ballot(key > worst_);
    }
    if (better >> lane_index() & 1) {
      queue_[queued_ + count_bits(better & ((1u << lane_index()) - 1))] = key;
    }
    queued_ += count_bits(better);
  }

  // Merges the queue into the list. Before that the list lacks the queued keys.
  CU_FAST_DEVICE void merge() {
    if (queued_ == 0) return;
    const int lane = lane_index();
    sync_warp();
    const uint64_t mine = sorted(lane < queued_ ? queue_[lane] : kEmpty);
    queue_[lane] = mine;
    sync_warp();
    const int64_t place = lane + beaten_by_list(mine);
    for (int64_t first = (k_ - 1) / 32 * 32; first >= 0; first -= 32) {
      const int64_t i = first + lane;
      const uint64_t key = i < k_ ? list_[i * stride_] : kEmpty;
      const int moves = key == kEmpty ? 0 : beaten_by_queue(key);
      sync_warp();
      if (moves > 0 && i + moves < k_) list_[(i + moves) * stride_] = key;
      if (!any_lane(moves > 0 || key == kEmpty)) break;
    }
    if (mine != kEmpty && place < k_) list_[place * stride_] = mine;
    sync_warp();
    worst_ = list_[(k_ - 1) * stride_];
    queued_ = 0;
  }

  // The last key of the list, as of the last merge.
  CU_FAST_DEVICE uint64_t worst() const { return worst_; }

 private:
  // Sorts one key per lane, the best in lane 0: bitonic.
  CU_FAST_DEVICE static uint64_t sorted(uint64_t key) {
    const int lane = lane_index();
    for (int size = 2; size <= 32; size *= 2) {
      for (int step = size / 2; step > 0; step /= 2) {
        const uint64_t other = shuffle_xor(key, step);
        const bool keeps_better = ((lane & step) == 0) == ((lane & size) == 0);
        key = (other > key) == keeps_better ? other : key;
      }
    }
    return key;
  }

  // How many keys of the list are above this one.
  CU_FAST_DEVICE int64_t beaten_by_list(uint64_t key) const {
    int64_t low = 0, high = k_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (list_[middle * stride_] > key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  CU_FAST_DEVICE int beaten_by_queue(uint64_t key) const {
    int low = 0, high = kQueue;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (queue_[middle] > key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  uint64_t* const list_;
  const int64_t stride_, k_;
  uint64_t* const queue_;
  uint64_t worst_;
  int queued_ = 0;
};

}  // namespace cu_fast
