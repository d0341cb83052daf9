// The end of a bottleneck in one kernel: merge the parts of a selection, weigh, gather and sum.
//
//   y[t] = reduce_i(w_i table[ids_i]) + b_dec      w_i: 1, or relu(score_i)
//
//   what           shape                      layout
//   kept, deleted  [T, capacity, parts] keys  sorted lists, as the selection leaves them (cuda/select.h)
//   table          [C, D]                     any stride, fp32, bf16 or fp16
//   y              [T, D]                     contiguous, table's dtype
//   receipt        [2] int64                  tokens, and kept codes that masks took away
//
// 1. The first warp of every block merges the token's parts (cuda/finish.h): doing it in each block is
//    cheaper than another launch.
// 2. The block decodes its share of the columns (cuda/decode.h). The first share adds to the receipt.

#include "cuda/decode.h"
#include "cuda/finish.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace cu_fast {
namespace {

CU_FAST_KERNEL(kDecodeThreads, 8)
finish_decode(BottleneckParams p, DecodeParams decode) {
  struct Shared {
    MergeShared merge;
    DecodeShared decode;
    const uint64_t* kept;
    int32_t hits;
    bool poisoned;
  };
  start_kernel();
  Shared& shared = shared_memory<Shared>();
  const int64_t token = block_index_x();
  if (warp_index() == 0) {
    const Merged merged = merge_parts(p.job, token, shared.merge);
    const int32_t hits = count_hits(merged, p.job.p.k);
    if (lane_index() == 0) {
      shared.kept = merged.kept;
      shared.poisoned = merged.poisoned;
      shared.hits = hits;
    }
  }
  // decode_columns begins with a barrier.
  const auto slot = [&](int64_t i) {
    const uint64_t key = shared.kept[i];
    if (shared.poisoned) return DecodeSlot{-1, quiet_nan()};
    if (key == kEmpty) return DecodeSlot{-1, 0};
    const float score = score_of(key);
    return DecodeSlot{id_of(key), !p.score_weights ? 1.0f : score > 0 ? score : 0.0f};
  };
  for (int64_t share = block_index_y(); share * kDecodeColumns < p.D; share += grid_size_y()) {
    const int32_t taken = decode_columns(decode, token, share * kDecodeColumns, slot, shared.decode);
    if (p.receipt == nullptr || share != 0 || thread_index() != 0) continue;
    atomic_add(&p.receipt[0], 1);
    if (taken + shared.hits > 0) atomic_add(&p.receipt[1], taken + shared.hits);
  }
}

}  // namespace

void launch_codebook_bottleneck(const BottleneckParams& p, Stream stream) {
  int64_t done = 0;
  for_each_chunk(p.job, [&](const SelectJob& job) {
    launch_select_parts(job, stream);
    BottleneckParams some = p;
    some.job = job;
    DecodeParams decode = {};
    decode.table = p.table;
    decode.bias = p.bias;
    decode.mask = p.ablated;
    if (decode.mask.row != nullptr) decode.mask.row += done;
    decode.mean = p.mean;
    decode.T = job.p.score.T;
    decode.C = job.p.score.C;
    decode.D = p.D;
    decode.k = job.p.k;
    const int64_t bytes = p.table.dtype == Dtype::f32 ? 4 : 2;
    decode.y = static_cast<char*>(p.y) + done * p.D * bytes;
    // A merged list in global memory (k > kFusedK) may have one writer only: one block per token.
    const int64_t shares = job.merged == nullptr ? (p.D + kDecodeColumns - 1) / kDecodeColumns : 1;
    launch(finish_decode, Grid2{decode.T, shares}, kDecodeThreads, stream, some, decode);
    done += decode.T;
  });
}

}  // namespace cu_fast
