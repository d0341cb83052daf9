// The k best codes of each token by scoring every code, and the end of every selection.
//
//   score(t, j) = <q_t, p_j> unit_t factor_j + bias_j        best: higher score, then smaller id
//
//   what         shape                        layout
//   q, p         [T, 3, W], [C, 3, W]         int8 digits (cuda/fix_rows.cu)
//   kept         [T, capacity, parts] keys    a part's list is sorted; equal ranks are contiguous
//   scores, ids  [T, k]                       best first
//
// 1. select_exact  A block takes a tile of tokens and one part of the codes, tile by tile: exact sums
//                  (cuda/fixed.h), the epilogue, keys (core/order.h) in shared memory, 64 tokens at a time.
// 2.               One warp per token offers the keys to the token's list (cuda/top_list.h), unless all are
//                  below the last of the list. A deleted code's
//                  key goes to the list of deleted codes, or to none: the mask is a predicate, not a score.
// 3.               A row with NaN or Inf, or whose mask row does not exist, leaves kPoison.
// 4. finish        A block per token takes the k best (cuda/finish.h), and writes ids, scores and hits.
//
// After a scan, select_exact does only the rows that the scan could not do; a block without any returns at
// once.

#include "cuda/finish.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/mask.h"
#include "cuda/tiles.h"
#include "cuda/top_list.h"

namespace cu_fast {
namespace {

// Lists of up to this many keys stay in shared memory, if few tokens share it.
constexpr int kSharedK = 64;

template <class Tile>
CU_FAST_KERNEL(kThreads, Tile::kBlocks)
select_exact(SelectJob job) {
  constexpr int kTokens = Tile::kTokens, kRound = Tile::kRound;
  constexpr int kLists = Tile::kListsInShared ? kTokens : 1;
  struct Shared {
    union {
      typename Tile::Shared tile;
      uint64_t keys[kRound][kTileCodes];
    };
    uint64_t queue[kWarps][kQueue];
    uint64_t lists[2][kLists][kSharedK];  // of kept and of deleted codes
    uint64_t worst[2][kTokens];           // the last key of each list
    bool todo[kTokens];
  };
  start_kernel();
  Shared& shared = shared_memory<Shared>();
  const SelectParams& p = job.p;
  const int64_t t0 = int64_t{block_index_y()} * kTokens, part = block_index_x();
  const int lane = lane_index(), warp = warp_index();

  bool any = false;
  for (int t = lane; t < kTokens; t += 32) {
    const bool todo = t0 + t < p.score.T && (!job.plan.scans || needs_exact(job, t0 + t));
    if (warp == 0) shared.todo[t] = todo;
    any |= todo;
  }
  if (!any_lane(any)) return;
  sync_block();

  // The list of token t: keys `stride` apart.
  const bool in_shared = Tile::kListsInShared && p.capacity <= kSharedK;
  const int64_t stride = in_shared ? 1 : p.parts;
  const auto list = [&](int deleted, int t) -> uint64_t* {
    if (in_shared) return shared.lists[deleted][t % kLists];
    return (deleted ? p.deleted : p.kept) + (t0 + t) * p.capacity * p.parts + part;
  };
  const int kinds = p.deleted == nullptr ? 1 : 2;
  for (int t = warp; t < kTokens; t += kWarps) {
    if (!shared.todo[t]) continue;
    for (int deleted = 0; deleted < kinds; ++deleted) {
      TopList::clear(list(deleted, t), stride, p.capacity);
      if (lane == 0) shared.worst[deleted][t] = kEmpty;
    }
  }

  const int64_t part_end = part * job.plan.part_codes + job.plan.part_codes;
  const int64_t c_end = part_end < p.score.C ? part_end : p.score.C;
  for (int64_t c0 = part * job.plan.part_codes; c0 < c_end; c0 += kTileCodes) {
    typename Tile::Sums sums;
    Tile::multiply(p.score, job.rows, t0, c0, shared.tile, sums);
#pragma unroll 1
    for (int round = 0; round < kTokens / kRound; ++round) {
      sync_block();
      const float* const unit = job.rows.unit + t0;
      Tile::each(sums, p.score, t0, c0, round, [&](int token, int code, CodeTerms terms, int64_t total) {
        shared.keys[token % kRound][code] = key_of_sum(total, unit[token], terms, c0 + code);
      });
      sync_block();
      for (int t = kRound * round + warp; t < kRound * (round + 1); t += kWarps) {
        if (!shared.todo[t]) continue;
        const MaskRow mask(p.mask, t0 + t);
        for (int deleted = 0; deleted < kinds; ++deleted) {
          uint64_t keys[kTileCodes / 32];
          bool better = false;
#pragma unroll
          for (int i = 0; i < kTileCodes / 32; ++i) {
            const int is_deleted = mask.word(c0 + 32 * i, p.score.C) >> lane & 1;
            const int code = 32 * i + lane;
            keys[i] = is_deleted == deleted && c0 + code < c_end ? shared.keys[t % kRound][code] : kEmpty;
            better |= keys[i] > shared.worst[deleted][t];
          }
          if (!any_lane(better)) continue;
          TopList best(list(deleted, t), stride, p.capacity, shared.queue[warp]);
#pragma unroll
          for (int i = 0; i < kTileCodes / 32; ++i) best.push(keys[i]);
          best.merge();
          if (lane == 0) shared.worst[deleted][t] = best.worst();
          sync_warp();
        }
      }
    }
  }

  for (int t = warp; t < kTokens; t += kWarps) {
    if (!shared.todo[t]) continue;
    const int64_t row = (t0 + t) * p.capacity * p.parts + part;
    for (int64_t i = lane; in_shared && i < p.capacity; i += 32) {
      p.kept[row + i * p.parts] = shared.lists[0][t % kLists][i];
      if (p.deleted != nullptr) p.deleted[row + i * p.parts] = shared.lists[1][t % kLists][i];
    }
    const float unit = job.rows.unit[t0 + t];
    const bool poisoned = unit != unit || !MaskRow(p.mask, t0 + t).exists();
    if (poisoned && lane == 0) p.kept[row] = kPoison;
  }
}

CU_FAST_KERNEL(kThreads, 2)
finish(SelectJob job) {
  start_kernel();
  MergeShared& shared = shared_memory<MergeShared>();
  const SelectParams& p = job.p;
  const int64_t token = block_index_x();
  const Merged merged = merge_parts(job, token, shared);
  for (int64_t i = thread_index(); i < p.k; i += kThreads) {
    const uint64_t key = merged.poisoned ? kEmpty : merged.kept[i];
    float score = merged.poisoned ? quiet_nan() : key == kEmpty ? 0.0f : score_of(key);
    if (p.relu && score <= 0) score = 0;
    p.scores[token * p.k + i] = score;
    p.ids[token * p.k + i] = key == kEmpty ? -1 : id_of(key);
  }
  if (p.hits == nullptr) return;
  const int32_t hits = count_hits(merged, p.k, shared);
  if (thread_index() == 0) p.hits[token] = hits;
}

}  // namespace

void launch_select_parts(const SelectJob& job, Stream stream) {
  if (job.plan.scans) {
    launch_scan(job, stream);
  } else {
    launch_fix_rows(job.p.score, job.rows, stream);
  }
  with_tile(job.plan.tokens, [&]<class Tile>(Tile) {
    const Grid2 grid{job.plan.parts, (job.p.score.T + Tile::kTokens - 1) / Tile::kTokens};
    launch(select_exact<Tile>, grid, {kThreads, Tile::kDynamicShared}, stream, job);
  });
}

void launch_codebook_quantize(const SelectJob& job, Stream stream) {
  for_each_chunk(job, [&](const SelectJob& chunk) {
    launch_select_parts(chunk, stream);
    launch(finish, Grid2{chunk.p.score.T}, kThreads, stream, chunk);
  });
}

}  // namespace cu_fast
