// Gather and sum: y[t] = reduce_i(w[t, i] table[ids[t, i]]) + bias + residual[t]. The algorithm:
// cuda/decode.h.
//
//   what      shape                  layout
//   ids       [T, k] int32           contiguous; -1: no code
//   weights   [T, k] fp32            contiguous; null: 1
//   table     [C, D], any stride     fp32, bf16 or fp16; read once per slot, 16 bytes per thread
//   residual  [T, D], any stride     null: none
//   y         [T, D]                 contiguous, table's dtype
//
// One block per token and 512 columns, so that one token with many columns uses many multiprocessors.

#include "cuda/decode.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace cu_fast {
namespace {

CU_FAST_KERNEL(kDecodeThreads, 8)
masked_decode(DecodeParams p) {
  start_kernel();
  DecodeShared& shared = shared_memory<DecodeShared>();
  const int64_t token = block_index_x(), at = token * p.k;
  const auto slot = [&](int64_t i) {
    return DecodeSlot{p.ids[at + i], p.weights == nullptr ? 1.0f : p.weights[at + i]};
  };
  decode_columns(p, token, int64_t{block_index_y()} * kDecodeColumns, slot, shared);
}

}  // namespace

void launch_masked_decode(const DecodeParams& p, Stream stream) {
  if (p.T == 0 || p.D == 0) return;
  launch(masked_decode, Grid2{p.T, (p.D + kDecodeColumns - 1) / kDecodeColumns}, kDecodeThreads, stream, p);
}

}  // namespace cu_fast
