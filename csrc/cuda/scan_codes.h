// How the two scans of the codes (scan_codes.cu, scan_codes_sm90.cu) read the codes. What they do with the sums:
// end_tile.h.
//
//   plane  [G, E / 4, 64, 4] uint8   global -> registers, not through L1: one warp reads it
//
// A warp takes 32 codes, in two products of 16 rows. Rows and k may be permuted freely. In lane 4 g + q, codes 4 g
// and 4 g + 1 are rows g and g + 8 of the first product, 4 g + 2 and 4 g + 3 of the second; words q and q + 4 of a
// step are its k. So one 16-byte load of a thread is one word of four neighbouring codes, and eight lanes load a
// whole 128-byte line.
//
// The sample is whole groups of 64 codes, spread over all of them, since neighbours may be alike: two warps have one.

#pragma once

#include "cuda/end_tile.h"
#include "cuda/kernels.h"

namespace cu_fast {

// The codes of this thread's warp.
struct WarpCodes {
  int first;
  int words;          // words per code; 0: codes beyond C
  const uint8_t* at;  // word 0 of this thread's four codes; of other codes if words is 0

  CU_FAST_DEVICE WarpCodes(const SelectParams& p, int first)
      : first(first),
        words(first < p.score.C ? static_cast<int>(scan_width(p.score.E) / 4) : 0),
        at(p.scan.group(words > 0 ? first / kScanGroup : 0, p.score.E) + first % kScanGroup * 4 +
           16 * (lane_index() / 4)) {}

  // Without a branch. Returns an arbitrary word if this one does not exist.
  CU_FAST_DEVICE uint4 load(int word) const {
    return load_streaming(at + (word < words ? word : 0) * (4 * kScanGroup));
  }
};

// Of blocks of so many groups of 64 codes: to all codes, or to those of the sample.
CU_FAST_BOTH inline int64_t visits(const SelectJob& job, bool sample, int64_t groups) {
  const int64_t all = sample ? job.plan.sample_groups : scan_groups(job.p.score.C);
  return (all + groups - 1) / groups;
}

// Which of the sample's groups this thread's warp has, at a visit of a block of kGroups; the last of them again if there
// are no more.
template <int kGroups>
CU_FAST_DEVICE int sample_of_warp(const SelectJob& job, int visit) {
  const int group = visit * kGroups + warp_index() / 2, last = static_cast<int>(job.plan.sample_groups) - 1;
  return group < last ? group : last;
}

// The first code of this thread's warp, in a group of the sample.
CU_FAST_DEVICE int first_of_sample(const SelectJob& job, int group) {
  const int64_t at = group * scan_groups(job.p.score.C) / job.plan.sample_groups;
  return static_cast<int>(at * kScanGroup) + warp_index() % 2 * 32;
}

// The a registers of both products, from words q (near) and q + 4 (far) of a step.
struct Factors {
  uint32_t of[2][4];

  CU_FAST_DEVICE void set(uint4 near, uint4 far) {
    of[0][0] = near.x, of[0][1] = near.y, of[0][2] = far.x, of[0][3] = far.y;
    of[1][0] = near.z, of[1][1] = near.w, of[1][2] = far.z, of[1][3] = far.w;
  }
};

}  // namespace cu_fast
