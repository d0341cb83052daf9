// Rows of z as integers, for all scores of a launch. One block per token (cuda/fix_rows.h).
//
//   q[t][e] = rint((z[t][e] - pre[e]) 2^a_t)      unit_t = 2^-a_t; a row with NaN or Inf: q = 0, unit NaN
//
//   what    shape           layout
//   z       [T, E]          any stride, fp32, bf16 or fp16
//   digits  [T, 3, W] int8  W = E padded to 64 with zeros: rows are 16-byte aligned
//   unit    [T] fp32

#include "cuda/fix_rows.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace cu_fast {
namespace {

CU_FAST_KERNEL(kThreads, 4)
fix_rows(ScoreParams p, FixedRows rows) {
  start_kernel();
  fix_row(p, rows, block_index_x(), shared_memory<BlockShared<float>>());
}

}  // namespace

void launch_fix_rows(const ScoreParams& p, const FixedRows& rows, Stream stream) {
  launch(fix_rows, Grid2{p.T}, kThreads, stream, p, rows);
}

}  // namespace cu_fast
