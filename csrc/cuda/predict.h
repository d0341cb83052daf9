// What a selection is predicted to take on a card, and how many candidates its scan leaves. plan_select
// (cuda/select.h) decides by these. Nothing here was measured, and no result depends on it.
//
//   times        the largest of bytes from memory, bytes from the second-level cache, and products, each over
//                the card's rate
//   candidates   codes whose score is above tau - error, where scores are normal:
//                C Q(Q^-1(share) - error / sigma), Q the upper tail of the normal distribution
//
// A code is p = d + step c, its entries normal. Of the error only ||q|| ||d - step c|| counts, as two digits of a
// row leave next to nothing. Rounding is off by step / sqrt(12) per entry, step = largest / 127, and a score
// varies by ||q|| ||p|| / sqrt(E): error / sigma = sqrt(E) (largest / sigma of an entry) / (127 sqrt(12)).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace cu_fast {

// A GPU, as plans see it: how many multiprocessors, and its compute capability.
struct Card {
  int64_t multiprocessors, major, minor;
};

// What a card can do at most, in 10^12 per second. Figures of data sheets, as they are remembered, but for those
// that no data sheet has, which are assumed: the second-level cache; dp4a, 64 of four products each per clock and
// multiprocessor; and mma.sync where newer instructions have the full rate (9.0: 62 % of it; 10.0 and 12.0: what
// a multiprocessor does per clock on 8.0).
struct Peaks {
  int64_t major, minor;
  double memory, cache;  // bytes
  double products;       // of int8, by mma.sync
  double many_products;  // the same of more than 64 tokens, of a scan 32: wgmma on 9.0
  double dot_products;   // by dp4a
};

inline constexpr Peaks kPeaks[] = {
    {8, 0, 2.04, 4.0, 312, 312, 39},    // A100 SXM, 80 GB
    {8, 6, 0.936, 2.0, 142, 142, 36},   // RTX 3090
    {8, 9, 1.01, 4.5, 330, 330, 82},    // RTX 4090; an L40S is like it
    {9, 0, 3.35, 5.5, 613, 989, 57},    // H100 SXM
    {10, 0, 8.0, 8.0, 560, 560, 70},    // B200
    {10, 3, 8.0, 8.0, 82, 82, 70},      // B300: hardly any int8 on matrix units
    {12, 0, 1.79, 6.0, 419, 419, 104},  // RTX 5090
};
// The shares of these that kernels are assumed to reach.
inline constexpr double kMemoryShare = 0.9, kCacheShare = 1, kProductsShare = 0.6, kDotShare = 1;

// The same per microsecond, as the kernels are assumed to reach it. A card that is not in the table has the rates of
// the newest that is older.
inline Peaks rates_of(const Card& card) {
  const Peaks* found = kPeaks;
  for (const Peaks& peaks : kPeaks) {
    if (peaks.major < card.major || (peaks.major == card.major && peaks.minor <= card.minor)) found = &peaks;
  }
  constexpr double k = 1e6;
  return {found->major,
          found->minor,
          found->memory * kMemoryShare * k,
          found->cache * kCacheShare * k,
          found->products * kProductsShare * k,
          found->many_products * kProductsShare * k,
          found->dot_products * kDotShare * k};
}

// Q(x): the share of a normal distribution above x.
inline double normal_above(double x) {
  return 0.5 * std::erfc(x / std::sqrt(2.0));
}

// Q^-1(share), 0 < share <= 1/2, off by less than 0.0005 (Abramowitz and Stegun, 26.2.23).
inline double normal_point(double share) {
  const double t = std::sqrt(-2 * std::log(share));
  return t -
         (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
}

// error / sigma of a scan of codes of width E. The largest of E normal entries is about Q^-1(e^-0.577 / 2E).
inline double scan_error(int64_t E) {
  return std::sqrt(static_cast<double>(E)) * normal_point(0.2807 / std::max<int64_t>(E, 1)) / (127 * 3.4641);
}

// Of C normal codes those whose upper bound reaches the score that a share of all codes reaches.
inline double codes_reaching(double share, int64_t C, int64_t E) {
  return share >= 0.5 ? C : C * normal_above(normal_point(share) - scan_error(E));
}

}  // namespace cu_fast
