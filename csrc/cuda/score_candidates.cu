// From bounds to scores: the first threshold, and exact scores of the candidates for the k best.
//
//   scan_threshold  tau = a guess: one of the sample's maxima, approximations, of so high a rank that k codes should be
//                   above it
//   first           scores the k candidates with the largest lower bounds
//   rest            reached = the k-th largest score or lower bound; scores the candidates that reach it; keeps
//                   the k best. If reached >= tau, k codes score tau or more: no code below tau is selected. If
//                   not, select_exact does the token
//
//   what        shape                 layout
//   id, bounds  [chunk, candidates]   in no order
//   kept        [T, k, parts] keys    as select_exact leaves them
//
// A block takes every score_parts-th candidate of a token. All blocks of a token compute the same `reached`. Then,
// 256 candidates at a time:
// 1. The candidates that reach it go into a list in shared memory.
// 2. A quad of threads scores one candidate from the digits of code and row (cuda/fixed.h).
// 3. rest: the first warp offers the keys to the block's list (cuda/top_list.h).
// The first pass scores few candidates and tightens `reached`, so that most other codes need not be read.

#include "cuda/finish.h"
#include "cuda/fixed.h"
#include "cuda/kernels.h"
#include "cuda/kth_largest.h"
#include "cuda/launch.h"

namespace cu_fast {
namespace {

CU_FAST_KERNEL(kThreads, 4)
scan_threshold(SelectJob job) {
  start_kernel();
  KthShared& shared = shared_memory<KthShared>();
  const int64_t token = block_index_x(), n = job.plan.sample_groups * kMaximaOfGroup;
  if (scan_failed(job, token)) return;
  const float* const maxima = job.work.maxima + token * n;
  const float tau = kth_largest(n, job.plan.rank, [&](int64_t i) { return maxima[i]; }, shared);
  if (thread_index() == 0) job.work.tau[token] = tau;
}

// The exact product of a row and code j, by a quad; j = -1: the quad has no candidate.
CU_FAST_DEVICE int64_t quad_product(const ScoreParams& p, const int8_t* row, int64_t j) {
  const int64_t width = digit_width(p.E);
  int32_t level[1][kLevels] = {};
  const auto q = [&](int, int column) { return load_digits(row, width, column); };
  if (j >= 0) add_columns<1, 4>(level, p.code(j), width, 0, static_cast<int>(width), q);
  return quad_total(level[0]);
}

template <bool kFirst>
CU_FAST_KERNEL(kThreads, 2)
score_candidates(SelectJob job) {
  struct Shared {
    KthShared kth;
    int32_t chosen[kThreads];
    int32_t count;
    uint64_t keys[kThreads];
    uint64_t queue[kQueue];
    uint64_t kept[kFirst ? 1 : kMaxScanK], deleted[kFirst ? 1 : kMaxScanK];
  };
  start_kernel();
  Shared& shared = shared_memory<Shared>();
  const SelectParams& p = job.p;
  const int64_t token = block_index_y(), part = block_index_x(), parts = grid_size_x();
  if (scan_failed(job, token)) return;
  const int64_t n = job.work.count[token], base = token * job.plan.candidates;
  const float *lower = job.work.lower + base, *upper = job.work.upper + base;
  float* const scored = job.work.scored + base;
  const int32_t* const id = job.work.id + base;
  const int8_t* const row = job.rows.row(token);
  const float unit = job.rows.unit[token];

  // A score replaces the lower bound. The first pass scores no deleted codes (their lower bound is
  // -inf), so that they do not raise it.
  const auto known = [&](int64_t i) { return scored[i] == scored[i] ? scored[i] : lower[i]; };
  const float reached =
      kth_largest(n, p.k, [&](int64_t i) { return kFirst ? lower[i] : known(i); }, shared.kth);
  if (kFirst && reached == -INFINITY) return;  // fewer than k bounds: the rest pass scores all
  if (!kFirst && part == 0 && thread_index() == 0) job.work.reached[token] = reached;
  if constexpr (!kFirst) {
    if (warp_index() == 0) {
      TopList::clear(shared.kept, 1, p.k);
      if (p.deleted != nullptr) TopList::clear(shared.deleted, 1, p.k);
    }
  }

  for (int64_t first = part; first < n; first += parts * kThreads) {
    sync_block();  // the previous keys and chosen have been read
    if (thread_index() == 0) shared.count = 0;
    shared.keys[thread_index()] = kEmpty;
    sync_block();
    const int64_t i = first + parts * thread_index();
    if (i < n && (kFirst ? lower[i] >= reached : !(upper[i] < reached))) {
      shared.chosen[atomic_add(&shared.count, 1)] = static_cast<int32_t>(i);
    }
    sync_block();
    for (int at = thread_index() / 4; at - thread_index() / 4 < shared.count; at += kThreads / 4) {
      const int64_t c = at < shared.count ? shared.chosen[at] : -1;
      const bool is_known = c >= 0 && scored[c] == scored[c];
      const int64_t j = c < 0 ? -1 : id[c] & 0x7fffffff;
      const int64_t total = quad_product(p.score, row, is_known ? -1 : j);
      if (c < 0 || thread_index() % 4 != 0) continue;
      const uint64_t key = is_known ? key_of(scored[c], static_cast<int32_t>(j))
                                    : key_of_sum(total, unit, load_terms(p.score, j), j);
      if constexpr (kFirst) {
        if (key != kEmpty) scored[c] = score_of(key);
      } else {
        shared.keys[at] = key;
      }
    }
    if constexpr (!kFirst) {
      sync_block();
      if (warp_index() == 0) {
        TopList kept(shared.kept, 1, p.k, shared.queue);
        for (int at = 0; at < shared.count; at += 32) {
          const int mine = at + lane_index();
          const bool flagged = mine < shared.count && id[shared.chosen[mine]] < 0;
          kept.push(flagged ? kEmpty : shared.keys[mine]);
        }
        kept.merge();
        if (p.deleted != nullptr) {
          TopList deleted(shared.deleted, 1, p.k, shared.queue);
          for (int at = 0; at < shared.count; at += 32) {
            const int mine = at + lane_index();
            const bool flagged = mine < shared.count && id[shared.chosen[mine]] < 0;
            deleted.push(flagged ? shared.keys[mine] : kEmpty);
          }
          deleted.merge();
        }
      }
    }
  }
  if constexpr (!kFirst) {
    sync_block();
    const int64_t lists = token * p.capacity * p.parts + part;
    for (int64_t i = thread_index(); i < p.k; i += kThreads) {
      p.kept[lists + i * p.parts] = shared.kept[i];
      if (p.deleted != nullptr) p.deleted[lists + i * p.parts] = shared.deleted[i];
    }
  }
}

}  // namespace

void launch_scan(const SelectJob& job, Stream stream) {
  const int64_t T = job.p.score.T;
  launch_scan_rows(job, stream);
  launch_scan_codes(job, /*sample=*/true, stream);
  launch(scan_threshold, Grid2{T}, kThreads, stream, job);
  launch_scan_codes(job, /*sample=*/false, stream);
  launch(score_candidates<true>, Grid2{job.plan.score_parts, T}, kThreads, stream, job);
  launch(score_candidates<false>, Grid2{job.plan.score_parts, T}, kThreads, stream, job);
}

}  // namespace cu_fast
