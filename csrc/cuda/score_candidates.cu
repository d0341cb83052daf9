// From bounds to scores: the first threshold, and exact scores of the candidates that may be among the k best.
//
//   scan_threshold  tau = a guess: one of the sample's maxima, approximations, of so high a rank that k codes should be
//                   above it
//   first           scores the k candidates with the largest lower bounds
//   rest            reached = the k-th largest score or lower bound; scores the candidates that reach it. If
//                   reached >= tau, k codes score tau or more: no code below tau is selected. If not, select_exact
//                   does the token
//
//   what           shape                layout
//   id, bounds     [chunk, candidates]  in no order
//   scored, exact  [chunk, candidates]  scores: of the first pass, and of both; NaN: none
//
// A block takes every score_parts-th candidate of a token. All blocks of a token compute the same `reached`, so the
// rest pass may not write what it is computed from: hence two arrays. Then, kHeldWords candidates at a time:
// 1. Those that reach it, and have no score yet, go into a list in shared memory.
// 2. Teams of threads sum up the products of digits (cuda/score_list.h).
// 3. Each thread makes the scores of its own candidates, and writes them. `finish` chooses among them.
// The first pass scores few candidates and tightens `reached`, so that most other codes need not be read.

#include "cuda/finish.h"
#include "cuda/kernels.h"
#include "cuda/kth_largest.h"
#include "cuda/launch.h"
#include "cuda/score_list.h"

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

template <bool kFirst>
CU_FAST_KERNEL(kThreads, 2)
score_candidates(SelectJob job) {
  struct Shared {
    KthShared kth;
    ListShared listed;
    int32_t count;
  };
  constexpr int kHeld = SelectTuning::kHeld;
  start_kernel();
  Shared& shared = shared_memory<Shared>();
  const SelectParams& p = job.p;
  const int64_t token = block_index_y(), part = block_index_x(), parts = grid_size_x();
  if (scan_failed(job, token)) return;
  const int64_t n = job.work.count[token], base = token * job.plan.candidates;
  const float *lower = job.work.lower + base, *upper = job.work.upper + base;
  const float* const scored = job.work.scored + base;
  float* const scores = (kFirst ? job.work.scored : job.work.exact) + base;
  const int32_t* const id = job.work.id + base;
  const float unit = job.rows.unit[token];

  // A score is no less than its lower bound, and NaN if there is none. The first pass scores no deleted codes (their
  // lower bound is -inf), so that they do not raise what is reached.
  const auto known = [&](int64_t i) { return kFirst ? lower[i] : fmaxf(scored[i], lower[i]); };
  const float reached = kth_largest(n, p.k, known, shared.kth);
  if (kFirst && reached == -INFINITY) return;  // fewer than k bounds: the rest pass scores all
  if (!kFirst && part == 0 && thread_index() == 0) job.work.reached[token] = reached;

#pragma unroll 1
  for (int64_t first = part; first < n; first += parts * kHeldWords) {
    const int64_t mine = first + parts * thread_index(), step = parts * kThreads;
    int32_t code[kHeld], place[kHeld];  // in the list; -1: not there
    float bound[kHeld], score[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      // Of a candidate that does not exist the first one is loaded, so that no load waits for a branch.
      const int64_t at = mine + i * step < n ? mine + i * step : first;
      bound[i] = (kFirst ? lower : upper)[at];
      score[i] = kFirst ? quiet_nan() : scored[at];
      code[i] = id[at] & 0x7fffffff;
    }
    int listed = 0;  // by this warp
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const bool reaches = kFirst ? bound[i] >= reached : !(bound[i] < reached);
      const bool chosen = mine + i * step < n && reaches && score[i] != score[i];
      const uint32_t votes = ballot(chosen);
      place[i] = chosen ? listed + count_bits(votes & ((1u << lane_index()) - 1)) : -1;
      listed += count_bits(votes);
    }
    if (thread_index() == 0) shared.count = 0;
    sync_block();
    const int before = shuffle(lane_index() == 0 ? atomic_add(&shared.count, listed) : 0, 0);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (place[i] < 0) continue;
      place[i] += before;
      shared.listed.list[place[i]] = code[i];
    }
    sync_block();
    sum_list(p.score, job.rows.row(token), shared.count, shared.listed);
    sync_block();
    CodeTerms terms[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t at = mine + i * step < n ? mine + i * step : first;
      score[i] = kFirst ? quiet_nan() : scored[at];
      terms[i] = load_terms(p.score, id[at] & 0x7fffffff);
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (place[i] >= 0) {
        const float sum = std::bit_cast<float>(shared.listed.list[place[i]]);
        const float made = round_score(static_cast<int64_t>(sum), unit, terms[i]);
        score[i] = is_finite(made) ? made : quiet_nan();
      }
      if (mine + i * step < n) scores[mine + i * step] = score[i];
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
