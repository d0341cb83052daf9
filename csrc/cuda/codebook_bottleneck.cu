// The end of a bottleneck in one kernel: the k best codes of a selection, weigh, gather and sum.
//
//   y[t] = reduce_i(w_i table[ids_i]) + b_dec      w_i: 1, or relu(score_i)
//
//   what     shape      layout
//   table    [C, D]     any stride, fp32, bf16 or fp16
//   y        [T, D]     contiguous, table's dtype
//   receipt  [2] int64  tokens, and kept codes that masks took away
//
// 1. Every block takes the token's k best (cuda/finish.h). It has as many columns as its threads can sum up: up to
//    D = 2,048 there is one block per token, and nothing is done twice. Beyond, that is cheaper than another launch.
// 2. The block decodes its share of the columns (cuda/decode.h). The first share adds to the receipt.

#include "cuda/decode.h"
#include "cuda/finish.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace cu_fast {
namespace {

constexpr int64_t kColumns = 8 * kThreads;  // per block

CU_FAST_KERNEL(kThreads, 2)
finish_decode(BottleneckParams p, DecodeParams decode) {
  struct Shared {
    MergeShared merge;
    DecodeShared decode;
  };
  start_kernel();
  Shared& shared = shared_memory<Shared>();
  const int64_t token = block_index_x();
  const Merged merged = merge_parts(p.job, token, shared.merge);
  const int32_t hits = count_hits(merged, p.job.p.k, shared.merge);
  const auto slot = [&](int64_t i) {
    if (merged.poisoned) return DecodeSlot{-1, quiet_nan()};
    const uint64_t key = merged.kept[i];
    if (key == kEmpty) return DecodeSlot{-1, 0};
    const float score = score_of(key);
    return DecodeSlot{id_of(key), !p.score_weights ? 1.0f : score > 0 ? score : 0.0f};
  };
  for (int64_t share = block_index_y(); share * kColumns < p.D; share += grid_size_y()) {
    const int32_t taken = decode_columns(decode, token, share * kColumns, slot, shared.decode);
    if (p.receipt == nullptr || share != 0 || thread_index() != 0) continue;
    atomic_add(&p.receipt[0], 1);
    if (taken + hits > 0) atomic_add(&p.receipt[1], taken + hits);
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
    const int64_t shares = job.merged == nullptr ? (p.D + kColumns - 1) / kColumns : 1;
    launch(finish_decode, Grid2{decode.T, shares}, kThreads, stream, some, decode);
    done += decode.T;
  });
}

}  // namespace cu_fast
