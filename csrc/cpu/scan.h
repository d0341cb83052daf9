// Sizes of the certified scan, and the scratch of one worker. The scan itself: scan-inl.h.

#pragma once

#include <algorithm>
#include <cstdint>

#include "core/params.h"
#include "core/scan.h"
#include "cpu/grid.h"

namespace cu_fast {

// The high bytes of four neighbours in a row of z, at bytes 4 step to 4 step + 3.
struct ScanOutlier {
  int32_t step;
  int8_t bytes[4];
};

// Candidates that a row's buffer holds; a group may add all its codes at once.
inline int64_t candidate_capacity(int64_t k) {
  return round_up(std::max<int64_t>(4096, 4 * k), kScanGroup) + kScanGroup;
}

// Tokens of a block: they share each reading of the plane, and of the codes that are scored.
inline constexpr int64_t kScanTokens = 256;

// What one worker needs for a block, by array. The first `rows` of everything are in use.
struct ScanScratch {
  int64_t rows, width, outliers, capacity;
  bool rides_along;

  explicit ScanScratch(const SelectParams& p)
      : rows(std::min(p.score.T, kScanTokens)),
        width(round_up(p.score.E, kLanes)),
        outliers(max_outliers(p.score.E)),
        capacity(candidate_capacity(p.k)),
        rides_along(p.deleted != nullptr) {}

  // Floats for z, 4 codes widened, bytes of z, outliers, bounds and ids.
  int64_t z() const { return 0; }
  int64_t codes() const { return z() + rows * width; }
  int64_t bytes() const { return codes() + 4 * width; }
  int64_t outlier() const { return bytes() + rows * width / 4; }
  int64_t upper() const { return outlier() + rows * outliers * 2; }
  int64_t lower() const { return upper() + rows * capacity; }
  int64_t lower_all() const { return lower() + rows * capacity; }
  int64_t id() const { return lower_all() + (rides_along ? rows * capacity : 0); }
  int64_t floats() const { return id() + rows * capacity; }
};

// How a selection runs. Pure: a function of its arguments, and no result depends on it.
struct SelectPlan {
  bool scans;  // by the plane; or every code is scored
  Grid grid;
};

// It scans where there is a plane, the bias leaves bounds finite, and k is small enough, among enough codes,
// to be worth the buffers.
inline SelectPlan plan_selection(int64_t T, int64_t C, int64_t E, int64_t k, int64_t threads, bool has_plane,
                                 float largest_bias) {
  const bool scans = has_plane && largest_bias <= kLargest && k <= kMaxScanK && 8 * k <= C;
  return {scans, plan_grid(T, C, E, threads, scans ? kScanTokens : kBlockTokens)};
}

}  // namespace cu_fast
