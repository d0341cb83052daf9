// Merges the sorted lists of a token's parts into its k best codes, and counts hits. By one warp.
//
//   what           shape                      layout
//   kept, deleted  [T, capacity, parts] keys  a part's list is sorted; equal ranks are contiguous
//   merged         [k] keys                   sorted, in shared memory, or in global memory for k > kFusedK

#pragma once

#include "core/params.h"
#include "cuda/select.h"
#include "cuda/top_list.h"

namespace cu_fast {

// Shared memory of the warp that merges.
struct MergeShared {
  uint64_t queue[kQueue];
  uint64_t kept[SelectTuning::kFusedK];
  uint64_t deleted[SelectTuning::kFusedK];
};

// A token's k best codes, and the k best deleted ones, sorted; kEmpty where there are fewer.
struct Merged {
  const uint64_t* kept;
  const uint64_t* deleted;  // null: hits are not counted
  bool poisoned;            // the row holds NaN or Inf, or its mask does not exist
};

// lists: [capacity, stride], the first `parts` columns sorted. Merges rank by rank: the best key of every
// part, then the second best, and so on. Stops at the first rank at which no part adds a key.
CU_FAST_DEVICE void merge_lists(const uint64_t* lists, int64_t parts, int64_t stride, int64_t capacity,
                                uint64_t* into, int64_t k, uint64_t* queue) {
  TopList::clear(into, 1, k);
  TopList best(into, 1, k, queue);
  for (int64_t i = 0; i < capacity; ++i) {
    bool useful = false;
    for (int64_t first = 0; first < parts; first += 32) {
      const int64_t part = first + lane_index();
      useful |= best.push(part < parts ? lists[i * stride + part] : kEmpty);
    }
    if (!useful) break;
  }
  best.merge();
}

// Whether the scan could not do this token: its row or its mask is faulty, or it has more candidates than places.
CU_FAST_DEVICE bool scan_failed(const SelectJob& job, int64_t token) {
  const float unit = job.work.terms[token].unit;
  return unit != unit || job.work.count[token] > job.plan.candidates;
}

// Whether select_exact does this token, after score_candidates: the scan failed, or its guess is not proven.
CU_FAST_DEVICE bool needs_exact(const SelectJob& job, int64_t token) {
  return scan_failed(job, token) || job.work.reached[token] < job.work.tau[token];
}

// `token` counts from the start of the chunk.
CU_FAST_DEVICE Merged merge_parts(const SelectJob& job, int64_t token, MergeShared& shared) {
  const SelectParams& p = job.p;
  const int64_t places = p.parts * p.capacity;
  const int64_t parts = job.plan.scans && !needs_exact(job, token) ? job.plan.score_parts : p.parts;
  uint64_t* const kept = job.merged == nullptr ? shared.kept : job.merged + token * p.k;
  uint64_t* const deleted = job.merged_deleted == nullptr ? shared.deleted : job.merged_deleted + token * p.k;
  merge_lists(p.kept + token * places, parts, p.parts, p.capacity, kept, p.k, shared.queue);
  if (p.deleted != nullptr) {
    merge_lists(p.deleted + token * places, parts, p.parts, p.capacity, deleted, p.k, shared.queue);
  }
  return {kept, p.deleted == nullptr ? nullptr : deleted, kept[0] == kPoison};
}

// Hits: how many of the k best codes would be deleted ones, if there were no mask.
CU_FAST_DEVICE int32_t count_hits(const Merged& merged, int64_t k) {
  if (merged.deleted == nullptr || merged.poisoned) return 0;
  int32_t hits = 0;
  for (int64_t first = 0; first < k; first += 32) {
    const int64_t i = first + lane_index();
    const uint64_t key = i < k ? merged.deleted[i] : kEmpty;
    int64_t better = 0, high = k;  // kept codes above it
    while (better < high) {
      const int64_t middle = (better + high) / 2;
      if (merged.kept[middle] > key) {
        better = middle + 1;
      } else {
        high = middle;
      }
    }
    hits += count_bits(ballot(key != kEmpty && i + better < k));
  }
  return hits;
}

}  // namespace cu_fast
