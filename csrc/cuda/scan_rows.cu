// Converts rows of z to integers, and those to bytes, with the terms that bound the error of that. One block per
// token.
//
//   z_t - pre ~ x_t = unit_t q_t       core/fixed.h; the score is of x, which floats hold exactly
//   x_t ~ unit (p + 254 h)             core/scan.h: terms of a row
//
//   what         shape                          layout
//   q            [chunk, 3, W] int8             digits (cuda/fix_rows.h)
//   bytes, high  [ceil(chunk / 8), K, 2, 8, 4]  p and h, four entries per word; 8 tokens x 32 entries: the
//                                               first 16 of each token, then the others. Lane 4 g + q of
//                                               multiply_bytes has its b at words 4 g + q and 32 + 4 g + q
//   high_steps   [chunk, ceil(K / 32)]          the steps in which h is not zero
//
// 1. The integers; of x the largest magnitude, the norm, and how many entries are above 1/2, 1/4, ... of it.
// 2. The clip: halved while few entries are above it. One outlier does not make the unit coarse for all.
// 3. Round each entry to a byte; one that does not fit is split into a low and a high byte.
// 4. Sums of squares, rounded up: a sum is off by at most one rounding per addend of a thread and per step of
//    the tree.
//
// A row with NaN or Inf, or too small or large for the bound, is marked for select_exact.

#include "cuda/fix_rows.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/mask.h"

namespace cu_fast {
namespace {

constexpr int kRange = 127;
constexpr int kBase = 2 * kRange;

struct Shared {
  BlockShared<float> floats;
  BlockShared<int32_t> ints;
  int32_t above[kMaxHalvings];
  uint32_t high_steps[(kMaxScanWidth / 32 + 31) / 32];
};

CU_FAST_KERNEL(kThreads, 4)
scan_rows(SelectJob job) {
  start_kernel();
  Shared& shared = shared_memory<Shared>();
  const ScoreParams& p = job.p.score;
  const ScanWork& work = job.work;
  const int64_t token = block_index_x(), steps = (p.E + 31) / 32;
  const float fixed_unit = fix_row(p, job.rows, token, shared.floats);
  // Four entries of x. Rows are padded to whole steps.
  const auto x = [&](int64_t word) {
    float4 four = fixed_four(job.rows.row(token), job.rows.width, 4 * word);
#pragma unroll
    for (int i = 0; i < 4; ++i) entry(four, i) *= fixed_unit;
    return four;
  };
  const int64_t words = steps * 8;
  const bool faulty = fixed_unit != fixed_unit;

  if (thread_index() < kMaxHalvings) shared.above[thread_index()] = 0;
  for (int64_t i = thread_index(); i < (steps + 31) / 32; i += kThreads) shared.high_steps[i] = 0;
  sync_block();  // the digits are visible to all threads
  float largest = 0, squares = 0;
  for (int64_t word = thread_index(); word < words && !faulty; word += kThreads) {
    float4 four = x(word);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      largest = fmaxf(largest, fabsf(entry(four, i)));
      squares += entry(four, i) * entry(four, i);
    }
  }
  largest = block_max(largest, shared.floats);
  squares = block_sum(squares, shared.floats);
  // A token whose mask row does not exist goes to select_exact, which marks it.
  const bool certified =
      MaskRow(job.p.mask, token).exists() && !faulty && largest >= kScanSmallest && largest <= kScanLargest;
  if (thread_index() == 0) {
    work.exact[token] = certified ? 0 : 1;
    work.count[token] = 0;
  }

  float clip = largest;
  if (certified) {
    int32_t above[kMaxHalvings] = {};
    for (int64_t word = thread_index(); word < words; word += kThreads) {
      float4 four = x(word);
      float limit = largest;
#pragma unroll
      for (int i = 0; i < kMaxHalvings; ++i) {
        limit /= 2;
#pragma unroll
        for (int c = 0; c < 4; ++c) above[i] += fabsf(entry(four, c)) > limit;
      }
    }
#pragma unroll
    for (int i = 0; i < kMaxHalvings; ++i) {
      if (above[i] > 0) atomic_add(&shared.above[i], above[i]);
    }
  }
  sync_block();
  for (int i = 0; certified && i < kMaxHalvings && shared.above[i] <= max_outliers(p.E); ++i) clip /= 2;

  // A row that is not certified is zeros here: it is multiplied, but its sums are never read.
  const float per_unit = certified ? kRange / clip : 0.0f, unit = certified ? clip / kRange : 0.0f;
  float misses = 0, squares_in = 0, l1_out = 0, mean_dot = 0;
  int32_t sum = 0, high_sum = 0;
  const int64_t fragments = token / 8 * steps * 64;
  for (int64_t word = thread_index(); word < words; word += kThreads) {
    uint32_t low_bytes = 0, high_bytes = 0;
    float4 four = make_float4(0, 0, 0, 0);
    if (certified) four = x(word);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t e = 4 * word + i;
      const float z = entry(four, i);
      float whole = rintf(z * per_unit);
      const float miss = z - unit * whole;
      misses += miss * miss;
      float high = 0;
      if (fabsf(whole) > kRange) {
        high = rintf(whole / kBase);
        whole -= kBase * high;
        l1_out += fabsf(z);
      } else {
        squares_in += z * z;
      }
      if (job.p.scan.mean != nullptr && e < p.E) mean_dot += z * job.p.scan.mean[e];
      sum += static_cast<int32_t>(whole);
      high_sum += static_cast<int32_t>(high);
      low_bytes |= (static_cast<uint32_t>(static_cast<int32_t>(whole)) & 255) << (8 * i);
      high_bytes |= (static_cast<uint32_t>(static_cast<int32_t>(high)) & 255) << (8 * i);
    }
    const int64_t step = word / 8, in_step = word % 8;
    const int64_t at = fragments + step * 64 + in_step / 4 * 32 + token % 8 * 4 + in_step % 4;
    work.bytes[at] = low_bytes;
    work.high[at] = high_bytes;
    if (high_bytes != 0) atomic_or(&shared.high_steps[step / 32], 1u << (step % 32));
  }
  misses = block_sum(misses, shared.floats);
  squares_in = block_sum(squares_in, shared.floats);
  l1_out = block_sum(l1_out, shared.floats);
  mean_dot = block_sum(mean_dot, shared.floats);
  sum = block_sum(sum, shared.ints);
  high_sum = block_sum(high_sum, shared.ints);
  for (int64_t i = thread_index(); i < (steps + 31) / 32; i += kThreads) {
    work.high_steps[token * ((steps + 31) / 32) + i] = shared.high_steps[i];
  }
  if (thread_index() != 0) return;

  // At most E / kThreads + 4 addends per thread, 5 steps of the tree, 8 warps: fewer than E / kLanes + 32.
  const float grow = 1.0f + 0x1p-23f * static_cast<float>(p.E / kLanes + 32);
  const float norm = sqrtf(squares) * grow;
  RowTerms terms;
  terms.unit = unit;
  terms.mean_dot = mean_dot;
  terms.norm_in = sqrtf(squares_in) * grow;
  terms.miss =
      sqrtf(misses) * grow + 0x1p-22f * norm;  // the second: rounding of unit * whole, and of z minus it
  terms.half_l1_out = 0.5f * l1_out * grow;
  terms.slop = norm * scan_epsilon(p.E);
  terms.start = -kOffset * sum;
  terms.high_start = -kOffset * high_sum;
  work.terms[token] = terms;
}

}  // namespace

void launch_scan_rows(const SelectJob& job, Stream stream) {
  launch(scan_rows, Grid2{job.p.score.T}, kThreads, stream, job);
}

}  // namespace cu_fast
