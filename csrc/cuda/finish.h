// From the sorted lists of a token's parts to its k best codes. By one warp.

#pragma once

#include "core/params.h"
#include "cuda/select.h"
#include "cuda/top_list.h"

namespace cu_fast {

// Shared memory of a warp that merges.
struct MergeShared {
  uint64_t queue[kQueue];
  uint64_t kept[SelectTuning::kFusedK];
  uint64_t deleted[SelectTuning::kFusedK];
};

// A token's k best codes, and the k best deleted ones, sorted; kEmpty where there are fewer.
struct Merged {
  const uint64_t* kept;
  const uint64_t* deleted;  // null: they did not ride along
  bool poisoned;            // the row holds NaN or Inf, or its mask does not exist
};

// lists: [capacity, stride], each of the first `parts` sorted. Reads the best of every part first, then the
// second best, until a whole row of them is of no use.
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

// Whether the scan could not do this token, so that select_exact did.
CU_FAST_DEVICE bool needs_exact(const SelectJob& job, int64_t token) {
  return job.work.exact[token] != 0 || job.work.count[token] > SelectTuning::kCandidates;
}

// `token` is one of the chunk's.
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

// How many of the k best codes would be deleted ones, had they been let in.
CU_FAST_DEVICE int32_t count_hits(const Merged& merged, int64_t k) {
  if (merged.deleted == nullptr || merged.poisoned) return 0;
  int32_t hits = 0;
  for (int64_t first = 0; first < k; first += 32) {
    const int64_t i = first + lane_index();
    const uint64_t key = i < k ? merged.deleted[i] : kEmpty;
    int64_t better = 0, high = k;  // kept codes that beat it
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
