// Sizes of the certified scan, and the scratch of one worker. The scan itself: scan-inl.h.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/params.h"
#include "core/scan.h"
#include "cpu/grid.h"
#include "cpu/simd.h"

namespace cu_fast {

// The high bytes of entries [4 step, 4 step + 4) of a row.
struct ScanOutlier {
  int32_t step;
  int8_t bytes[4];
};

// Candidates of a row at which some have to be scored.
inline int64_t candidate_room(int64_t k) {
  return round_up(std::max<int64_t>(4096, 4 * k), kScanGroup);
}

// Places in a row's buffer of candidates: no more than there are codes. The last kScanGroup are spare: a group may add all
// its codes at once.
inline int64_t candidate_capacity(int64_t k, int64_t C) {
  return std::min(candidate_room(k), round_up(C, kScanGroup)) + kScanGroup;
}

// Tokens per block: all of them use each read of the plane, and of the codes that are scored.
inline constexpr int64_t kScanTokens = 256;

// One group in so many is the sample of the guess, which fewer groups than kLeastGroups do not repay.
inline constexpr int64_t kSampleShare = 16, kLeastGroups = 192;

// Groups of the sample. All approximations of a row fit its buffer of candidates.
inline int64_t sample_groups(int64_t groups) {
  return groups < kLeastGroups ? 0 : std::min<int64_t>((groups + kSampleShare - 1) / kSampleShare, 32);
}

// The scratch of one worker: where each array starts, in floats. Arrays have `rows` rows.
struct ScanScratch {
  int64_t rows, width, outliers, samples, capacity;
  bool counts_hits;  // hits are counted: deleted codes are candidates too
  int64_t tile_floats;

  explicit ScanScratch(const SelectParams& p)
      : rows(std::min(p.score.T, kScanTokens)),
        width(digit_width(p.score.E)),
        outliers(max_outliers(p.score.E)),
        samples(sample_groups(scan_groups(p.score.C)) * kScanGroup),
        capacity(candidate_capacity(p.k, p.score.C)),
        counts_hits(p.deleted != nullptr),
        tile_floats(simd_level() == SimdLevel::amx ? 2 * round_up(rows, 32) * tile_stride() / 4 : 0) {}

  // Offsets of one row of z, widened, of z as integers, bytes of z, outliers, the sample, bounds, ids, and low and high
  // bytes on tiles.
  int64_t z() const { return 0; }
  int64_t fixed() const { return z() + width; }
  int64_t bytes() const { return fixed() + rows * width * 3 / 2; }
  int64_t outlier() const { return bytes() + rows * width / 4; }
  int64_t sample() const { return outlier() + rows * outliers * 2; }
  int64_t upper() const { return sample() + rows * samples; }
  int64_t lower() const { return upper() + rows * capacity; }
  int64_t lower_all() const { return lower() + rows * capacity; }
  int64_t id() const { return lower_all() + (counts_hits ? rows * capacity : 0); }
  int64_t tiles() const { return round_up(id() + rows * capacity, kLanes); }
  int64_t floats() const { return tiles() + tile_floats; }

  // Bytes from one row on tiles to the next, an odd number of cache lines: bytes, then a start (scan_tiles-inl.h).
  int64_t tile_stride() const { return width / 64 % 2 == 0 ? width + 64 : width + 128; }
};

// How a selection runs. A pure function of its arguments and the instruction set; no result depends on it.
struct SelectGrid {
  bool scans;  // false: every code is scored
  Grid grid;
};

// Scans if there is a plane, the bias is finite, and k is small enough, and C large enough, to
// justify the buffers of candidates.
inline SelectGrid plan_selection(int64_t T, int64_t C, int64_t E, int64_t k, int64_t threads, bool has_plane,
                                 float largest_bias) {
  const bool scans =
      has_plane && largest_bias <= std::numeric_limits<float>::max() && k <= kMaxScanK && 8 * k <= C;
  if (!scans) return {false, plan_grid(T, C, E, threads)};
  const bool on_tiles = simd_level() == SimdLevel::amx;
  return {true, plan_grid(T, C, E, threads, kScanTokens, on_tiles ? kFairTileTokens : kFairTokens)};
}

}  // namespace cu_fast
