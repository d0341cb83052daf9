// The k best codes of each token by scoring every code, and the end of every selection.
//
//   score(t, j) = canonical(z_t - pre, c_j) inv_norm_j + bias_j        best: higher score, then smaller id
//
//   what         shape                        layout
//   z, codes     [T, E], [C, E]               any stride, fp32, bf16 or fp16
//   kept         [T, capacity, parts] keys    a part's list is sorted; equal ranks are contiguous
//   scores, ids  [T, k]                       best first
//
// 1. select_exact  A block takes a tile of tokens and one part of the codes, tile by tile: canonical dot
//                  products, the epilogue, keys (core/order.h) in shared memory.
// 2.               One warp per token offers the keys to the token's list (cuda/top_list.h). A deleted code's
//                  key goes to the list of deleted codes, or to none: the mask is a predicate, not a score.
// 3.               A row with NaN or Inf, or whose mask row does not exist, leaves kPoison.
// 4. finish        One warp per token merges its parts, and writes ids, scores and hits.
//
// After a scan, select_exact does only the rows that the scan could not do; a block without any returns at
// once.

#include "cuda/canonical.h"
#include "cuda/finish.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/mask.h"

namespace cu_fast {
namespace {

// Lists of up to this many keys stay in shared memory.
constexpr int kSharedK = 64;

template <class Tile>
CU_FAST_KERNEL(kThreads, 2)
select_exact(SelectJob job) {
  struct Shared {
    union {
      typename Tile::Shared tile;
      uint64_t keys[Tile::kTokens][Tile::kCodes];
    };
    uint64_t queue[kWarps][kQueue];
    uint64_t kept[Tile::kTokens][kSharedK], deleted[Tile::kTokens][kSharedK];
    uint32_t faulty;
  };
  start_kernel();
  Shared& shared = shared_memory<Shared>();
  const SelectParams& p = job.p;
  const int64_t t0 = int64_t{block_index_y()} * Tile::kTokens, part = block_index_x();
  const int lane = lane_index(), warp = warp_index();

  const int64_t mine = t0 + lane;
  const bool todo = lane < Tile::kTokens && mine < p.score.T && (!job.plan.scans || needs_exact(job, mine));
  const uint32_t wanted = ballot(todo);
  if (wanted == 0) return;

  // The list of token t, of kept or deleted codes: keys `stride` apart.
  const bool in_shared = p.capacity <= kSharedK;
  const int64_t stride = in_shared ? 1 : p.parts;
  const auto list = [&](int t, bool of_deleted) -> uint64_t* {
    if (in_shared) return of_deleted ? shared.deleted[t] : shared.kept[t];
    return (of_deleted ? p.deleted : p.kept) + (t0 + t) * p.capacity * p.parts + part;
  };
  for (int t = warp; t < Tile::kTokens; t += kWarps) {
    if ((wanted >> t & 1) == 0) continue;
    TopList::clear(list(t, false), stride, p.capacity);
    if (p.deleted != nullptr) TopList::clear(list(t, true), stride, p.capacity);
  }
  if (thread_index() == 0) shared.faulty = 0;

  const int64_t part_end = part * job.plan.part_codes + job.plan.part_codes;
  const int64_t c_end = part_end < p.score.C ? part_end : p.score.C;
  for (int64_t c0 = part * job.plan.part_codes; c0 < c_end; c0 += Tile::kCodes) {
    float dots[Tile::kM][Tile::kN];
    Tile::dots(p.score, t0, c0, shared.tile, &shared.faulty, dots);
    sync_block();
    each_pair<Tile>(dots, [&](int token, int code, float dot) {
      shared.keys[token][code] = c0 + code < c_end ? key_of_dot(p, dot, c0 + code) : kEmpty;
    });
    sync_block();
    for (int t = warp; t < Tile::kTokens; t += kWarps) {
      if ((wanted >> t & 1) == 0 || shared.faulty >> t & 1) continue;
      const MaskRow mask(p.mask, t0 + t);
      TopList kept(list(t, false), stride, p.capacity, shared.queue[warp]);
      for (int first = 0; first < Tile::kCodes; first += 32) {
        const bool deleted = mask.word(c0 + first, p.score.C) >> lane & 1;
        kept.push(deleted ? kEmpty : shared.keys[t][first + lane]);
      }
      kept.merge();
      if (p.deleted == nullptr) continue;
      TopList best_deleted(list(t, true), stride, p.capacity, shared.queue[warp]);
      for (int first = 0; first < Tile::kCodes; first += 32) {
        const bool deleted = mask.word(c0 + first, p.score.C) >> lane & 1;
        best_deleted.push(deleted ? shared.keys[t][first + lane] : kEmpty);
      }
      best_deleted.merge();
    }
  }

  for (int t = warp; t < Tile::kTokens; t += kWarps) {
    if ((wanted >> t & 1) == 0) continue;
    const int64_t row = (t0 + t) * p.capacity * p.parts + part;
    for (int64_t i = lane; in_shared && i < p.capacity; i += 32) {
      p.kept[row + i * p.parts] = shared.kept[t][i];
      if (p.deleted != nullptr) p.deleted[row + i * p.parts] = shared.deleted[t][i];
    }
    const bool poisoned = (shared.faulty >> t & 1) != 0 || !MaskRow(p.mask, t0 + t).exists();
    if (poisoned && lane == 0) p.kept[row] = kPoison;
  }
}

CU_FAST_KERNEL(32, 16)
finish(SelectJob job) {
  start_kernel();
  MergeShared& shared = shared_memory<MergeShared>();
  const SelectParams& p = job.p;
  const int64_t token = block_index_x();
  const Merged merged = merge_parts(job, token, shared);
  for (int64_t i = lane_index(); i < p.k; i += 32) {
    const uint64_t key = merged.kept[i];
    const bool empty = merged.poisoned || key == kEmpty;
    float score = merged.poisoned ? quiet_nan() : empty ? 0.0f : score_of(key);
    if (p.relu && score <= 0) score = 0;
    p.scores[token * p.k + i] = score;
    p.ids[token * p.k + i] = empty ? -1 : id_of(key);
  }
  if (p.hits == nullptr) return;
  const int32_t hits = count_hits(merged, p.k);
  if (lane_index() == 0) p.hits[token] = hits;
}

template <class Tile>
void launch_exact(const SelectJob& job, Stream stream) {
  // gridDim.y <= 65535: a chunk is at most 2^18 tokens (plan_select), 2^18 / 16 = 16384 tiles.
  const Grid2 grid{job.plan.parts, (job.p.score.T + Tile::kTokens - 1) / Tile::kTokens};
  launch(select_exact<Tile>, grid, kThreads, stream, job);
}

}  // namespace

void launch_select_parts(const SelectJob& job, Stream stream) {
  if (job.plan.scans) launch_scan(job, stream);
  with_tile(job.plan.chunk, [&]<class Tile>(Tile) { launch_exact<Tile>(job, stream); });
}

void launch_codebook_quantize(const SelectJob& job, Stream stream) {
  for_each_chunk(job, [&](const SelectJob& chunk) {
    launch_select_parts(chunk, stream);
    launch(finish, Grid2{chunk.p.score.T}, 32, stream, chunk);
  });
}

}  // namespace cu_fast
