// Exact sums (cuda/fixed.h) of a row and the codes of a list, by a block of kThreads.
//
//   what   shape                          where it stays
//   row    [3, W] int8                    global: L1 serves it
//   codes  [3, W] int8 each               shared: a ring of kCopies times 16 entries per thread
//   list   [kHeldWords] ids, then sums    shared: int32, then fp32
//
// 1. A team of 4, 8, 16 or 32 neighbouring threads has one code at a time, 16 entries of it per thread. The shorter the
//    list, the larger the teams, so that no thread is idle and few codes are left for the last round.
// 2. Copies run kCopies - 1 steps ahead, across codes: the next code's first digits are under way before the
//    present one is finished. A thread reads only what it copied, so there are no barriers.
// 3. A code's sum, rounded to fp32 as the score wants it, takes the place of its id.

#pragma once

#include <bit>

#include "cuda/fixed.h"
#include "cuda/kth_largest.h"

namespace cu_fast {

inline constexpr int kCopies = 3;
// Codes per team of more than 4 threads, at most.
inline constexpr int kRounds = 4;

struct ListShared {
  uint4 ring[kCopies][kDigits][kThreads];
  int32_t list[kHeldWords];
};

// The block's threads have written the first `count` ids before a barrier. Needs a barrier before sums are read.
CU_FAST_DEVICE void sum_list(const ScoreParams& p, const int8_t* row, int count, ListShared& shared) {
  const int width = static_cast<int>(digit_width(p.E));
  int lanes = 32;
  while (lanes > 4 && count * lanes > kRounds * kThreads) lanes /= 2;
  const int teams = kThreads / lanes, team = thread_index() / lanes, step = 16 * lanes;
  const int mine = 16 * (thread_index() % lanes);
  constexpr int kStage = kDigits * kThreads;
  uint4* const ring = &shared.ring[0][0][thread_index()];

  // What is copied next: of the code at place `ahead` of the list, of which `left` columns are left.
  int ahead = team, left = 0, to = 0;
  const int8_t* code = p.digits;
  const auto begin_code = [&] {
    if (ahead >= count) return;
    code = p.code(shared.list[ahead]) + mine;
    left = width;
  };
  const auto copy_step = [&] {
    if (left > mine) {
#pragma unroll
      for (int i = 0; i < kDigits; ++i) copy_async(ring + to + i * kThreads, code + i * width, true);
    }
    commit_copies();
    to = to == (kCopies - 1) * kStage ? 0 : to + kStage;
    code += step;
    left -= step;
    if (left > 0) return;
    ahead += teams;
    begin_code();
  };

  begin_code();
#pragma unroll 1
  for (int i = 0; i < kCopies - 1; ++i) copy_step();
  int from = 0;
#pragma unroll 1
  for (int at = team; at - team < count; at += teams) {
    int32_t level[kLevels] = {};
    const int8_t* q = row + mine;
    const int end = at < count ? mine : width;
#pragma unroll 1
    for (int columns = width; columns > 0; columns -= step) {
      copy_step();
      wait_copies<kCopies - 1>();
      if (columns > end) {
        Digits16 digits;
#pragma unroll
        for (int i = 0; i < kDigits; ++i) digits.of[i] = ring[from + i * kThreads];
        add_products(level, load_digits(q, width, 0), digits);
      }
      from = from == (kCopies - 1) * kStage ? 0 : from + kStage;
      q += step;
    }
    int64_t total = sum_levels(level);
#pragma unroll 1
    for (int other = 1; other < lanes; other *= 2) total += shuffle_xor(total, other);
    sync_warp();  // the team has read the id: its copies are at the codes behind it
    if (at < count && mine == 0) shared.list[at] = std::bit_cast<int32_t>(to_float(total));
  }
  wait_copies<0>();
}

}  // namespace cu_fast
