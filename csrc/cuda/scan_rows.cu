// Rows of z as integers, of which the scan reads two of three digits, and the terms that bound what the third
// would add (core/scan.h). One block per token, up to a multiple of four.
//
//   z_t - pre ~ unit_t q_t       q_t = 65536 d_0 + 256 d_1 + d_2        core/fixed.h
//
//   what   shape                          layout
//   q      [chunk, 3, W] int8             digits (cuda/fix_rows.h)
//   bytes  [ceil(chunk / 4), K, 2, 8, 4]  d_0 and d_1, four entries per word; 8 columns x 32 entries: the first
//                                         16 of each column, then the others. Columns 2 t and 2 t + 1 are the
//                                         digits of token t. Lane 4 g + q of multiply_bytes has its b at words
//                                         4 g + q and 32 + 4 g + q
//
// 1. The digits, all three for the exact scores; then two of them once more, in columns.
// 2. Norms are roots of exact integers, rounded up; <q, mean> is a sum of doubles, rounded once.
//
// A row with NaN or Inf, or whose mask row does not exist, is marked for select_exact.

#include "cuda/fix_rows.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/mask.h"

namespace cu_fast {
namespace {

struct Shared {
  BlockShared<float> floats;
  BlockShared<int32_t> ints;
  BlockShared<int64_t> longs;
  BlockShared<double> doubles;
};

// The root, at least: what it is multiplied with exceeds the roundings.
CU_FAST_DEVICE float root_above(int64_t squares) {
  return sqrtf(to_float(squares)) * (1.0f + 0x1p-21f);
}

CU_FAST_KERNEL(kThreads, 4)
scan_rows(SelectJob job) {
  start_kernel();
  Shared& shared = shared_memory<Shared>();
  const ScoreParams& p = job.p.score;
  const float* const mean = job.p.scan.mean;
  const int64_t token = block_index_x(), steps = (p.E + 31) / 32;
  uint32_t* const columns = job.work.bytes + token / 4 * steps * 64 + token % 4 * 8;
  if (token >= p.T) {  // the rest of the last columns, which are read
    for (int64_t word = thread_index(); word < steps * 8; word += kThreads) {
      for (int i = 0; i < 2; ++i) columns[word / 4 * 32 + 4 * i + word % 4] = 0;
    }
    return;
  }
  const float unit = fix_row(p, job.rows, token, shared.floats);
  const int8_t* const row = job.rows.row(token);

  sync_block();  // the digits are visible to all threads
  int64_t squares = 0;
  int32_t missed = 0, sums[2] = {};
  double mean_dot = 0;
  for (int64_t word = thread_index(); word < steps * 8; word += kThreads) {
    uint32_t digits[kDigits];
#pragma unroll
    for (int i = 0; i < kDigits; ++i) {
      digits[i] = *reinterpret_cast<const uint32_t*>(row + i * job.rows.width + 4 * word);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      columns[word / 4 * 32 + 4 * i + word % 4] = digits[i];
      sums[i] = dot_bytes(sums[i], digits[i], 0x01010101);
    }
    missed = dot_bytes(missed, digits[2], digits[2]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int32_t q = 0;
#pragma unroll
      for (int i = 0; i < kDigits; ++i) q = 256 * q + static_cast<int8_t>(digits[i] >> (8 * c));
      squares += int64_t{q} * q;
      if (mean != nullptr && 4 * word + c < p.E) mean_dot += double{mean[4 * word + c]} * q;
    }
  }
  squares = block_sum(squares, shared.longs);
  missed = block_sum(missed, shared.ints);
  mean_dot = block_sum(mean_dot, shared.doubles);
#pragma unroll
  for (int i = 0; i < 2; ++i) sums[i] = block_sum(sums[i], shared.ints);
  if (thread_index() != 0) return;

  RowTerms terms;
  terms.unit = MaskRow(job.p.mask, token).exists() ? unit : quiet_nan();
  terms.mean_dot = static_cast<float>(mean_dot);
  terms.norm = norm_of(unit * root_above(squares));
  terms.miss = unit * root_above(missed > 1 ? missed : 1);
#pragma unroll
  for (int i = 0; i < 2; ++i) terms.start[i] = -kOffset * sums[i];
  job.work.terms[token] = terms;
  job.work.count[token] = 0;
}

}  // namespace

void launch_scan_rows(const SelectJob& job, Stream stream) {
  launch(scan_rows, Grid2{round_up(job.p.score.T, 4)}, kThreads, stream, job);
}

}  // namespace cu_fast
