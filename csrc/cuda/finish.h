// A token's k best codes, from where its selection left them, and its hits. By a block of kThreads.
//
//   what            shape                      left by
//   exact, id       [T, candidates]            score_candidates: a score, or NaN; bit 31 of id: deleted
//   kept, deleted   [T, capacity, parts] keys  select_exact: a part's list is sorted; equal ranks are contiguous
//   merged          [k] keys                   sorted, in shared memory, or in global memory for k > kFusedK
//
// 1. After a scan: the k best (cuda/best_keys.h) of the scores.
// 2. One list: it is copied. Several: the k-th best of so many first ranks that they hold k keys is a bound that few
//    other keys reach. Ranks are doubled as long as one does; the k best of these are the k best of all.

#pragma once

#include "core/params.h"
#include "cuda/best_keys.h"

namespace cu_fast {

// Shared memory of the block that merges.
struct MergeShared {
  BestShared best;
  uint32_t any;
  int32_t hits;
  uint64_t kept[SelectTuning::kFusedK];
  uint64_t deleted[SelectTuning::kFusedK];
};

// A token's k best codes, and the k best deleted ones, sorted; kEmpty where there are fewer.
struct Merged {
  const uint64_t* kept;
  const uint64_t* deleted;  // null: hits are not counted
  bool poisoned;            // the row holds NaN or Inf, or its mask does not exist; the lists are not written
};

// A candidate as it is loaded. It does not count if its score is NaN or its id negative.
struct Scored {
  float score;
  int32_t id;
};

CU_FAST_DEVICE uint64_t word_of(Scored x) {
  return x.score == x.score && x.id >= 0 ? key_of(x.score, x.id) : kEmpty;
}

// Whether it holds for any thread of the block.
CU_FAST_DEVICE bool any_thread(bool x, uint32_t& shared) {
  sync_block();  // the previous answer has been read
  if (thread_index() == 0) shared = 0;
  sync_block();
  if (any_lane(x) && lane_index() == 0) atomic_or(&shared, 1u);
  sync_block();
  return shared != 0;
}

// lists: [capacity, parts], the columns sorted. Writes the k best keys.
CU_FAST_DEVICE void merge_lists(const uint64_t* lists, int64_t parts, int64_t capacity, uint64_t* into,
                                int64_t k, MergeShared& shared) {
  const auto key = [&](int64_t i) { return lists[i]; };
  if (parts == 1) {
    for (int64_t i = thread_index(); i < k; i += kThreads) into[i] = lists[i];
    sync_block();
    return;
  }
  int64_t ranks = (k + parts - 1) / parts;
  if (ranks < capacity) {
    Words first(ranks * parts, key);
    const uint64_t bound = kth_word<false>(first, k, shared.best.kth);
    for (bool reaches = true; reaches && ranks < capacity;) {
      reaches = false;
      for (int64_t part = thread_index(); part < parts; part += kThreads) {
        const uint64_t next = lists[ranks * parts + part];
        reaches |= next != kEmpty && next >= bound;
      }
      reaches = any_thread(reaches, shared.any);
      if (reaches) ranks = 2 * ranks < capacity ? 2 * ranks : capacity;
    }
  }
  best_keys(ranks * parts, k, key, into, shared.best);
}

// Whether the scan could not do this token: its row or its mask is faulty, or it has more candidates than places.
CU_FAST_DEVICE bool scan_failed(const SelectJob& job, int64_t token) {
  const float unit = job.work.terms[token].unit;
  const int32_t count = job.work.count[token];  // on its way together with the unit
  return (unit != unit) | (count > job.plan.candidates);
}

// Whether select_exact does this token, after score_candidates: the scan failed, or its guess is not proven.
CU_FAST_DEVICE bool needs_exact(const SelectJob& job, int64_t token) {
  return scan_failed(job, token) || job.work.reached[token] < job.work.tau[token];
}

// `token` counts from the start of the chunk.
CU_FAST_DEVICE Merged merge_parts(const SelectJob& job, int64_t token, MergeShared& shared) {
  const SelectParams& p = job.p;
  uint64_t* const kept = job.merged == nullptr ? shared.kept : job.merged + token * p.k;
  uint64_t* const deleted = job.merged_deleted == nullptr ? shared.deleted : job.merged_deleted + token * p.k;
  const int kinds = p.deleted == nullptr ? 1 : 2;
  const Merged merged = {kept, p.deleted == nullptr ? nullptr : deleted, false};
  if (job.plan.scans && !needs_exact(job, token)) {
    const float* const exact = job.work.exact + token * job.plan.candidates;
    const int32_t* const ids = job.work.id + token * job.plan.candidates;
#pragma unroll 1
    for (int kind = 0; kind < kinds; ++kind) {
      const bool flagged = kind == 1;
      const uint32_t others = flagged ? 0x80000000u : 0;
      const auto scored = [&](int64_t i) { return Scored{exact[i], static_cast<int32_t>(ids[i] ^ others)}; };
      best_keys(job.work.count[token], p.k, scored, flagged ? deleted : kept, shared.best);
    }
    return merged;
  }
  const int64_t places = p.parts * p.capacity;
  // Every part of a faulty row begins with kPoison.
  if (p.kept[token * places] == kPoison) return {kept, nullptr, true};
#pragma unroll 1
  for (int kind = 0; kind < kinds; ++kind) {
    const bool flagged = kind == 1;
    const uint64_t* const lists = (flagged ? p.deleted : p.kept) + token * places;
    merge_lists(lists, p.parts, p.capacity, flagged ? deleted : kept, p.k, shared);
  }
  return merged;
}

// Hits: how many of the k best codes would be deleted ones, if there were no mask.
CU_FAST_DEVICE int32_t count_hits(const Merged& merged, int64_t k, MergeShared& shared) {
  if (merged.deleted == nullptr) return 0;
  if (thread_index() == 0) shared.hits = 0;
  sync_block();
  for (int64_t i = thread_index(); i < k; i += kThreads) {
    const uint64_t key = merged.deleted[i];
    int64_t better = 0, high = k;  // kept codes above it
    while (better < high) {
      const int64_t middle = (better + high) / 2;
      if (merged.kept[middle] > key) {
        better = middle + 1;
      } else {
        high = middle;
      }
    }
    if (key != kEmpty && i + better < k) atomic_add(&shared.hits, 1);
  }
  sync_block();
  return shared.hits;
}

}  // namespace cu_fast
