// Sums over one row in a defined order, as the scales of tokens need them: the same bits on every machine with
// IEEE fp32.
//
//   partial[l] = 0 + x[l] + x[l+16] + ...   l = 0..15; where x is a product, that is rounded first: never fused
//   sum16      = the 16 partials added as a tree: l with l+8, then l+4, l+2, l+1
//
// A length that is no multiple of 16 is padded with zeros. -ffp-contract=off keeps the compiler from fusing.

#pragma once

#include <cstdint>

#include "core/portable.h"

namespace cu_fast {

inline constexpr int kLanes = 16;

CU_FAST_BOTH inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Adds the partials as the tree above, and overwrites them.
inline float tree_sum(float (&partial)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) partial[l] += partial[l + half];
  }
  return partial[0];
}

}  // namespace cu_fast
