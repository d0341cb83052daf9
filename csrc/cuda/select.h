// A selection on a GPU: how it is cut, and its memory. Plans are pure functions; no result depends on them.
//
//   every code scored   fix_rows, select_exact, finish
//   certified scan      scan_rows, scan_codes (sample), scan_threshold, scan_codes, score_candidates (first),
//                       score_candidates (rest), select_exact (rows that the scan could not do), finish
//
// Tokens go in chunks, so that memory does not grow with T.

#pragma once

#include <algorithm>
#include <cmath>

#include "core/params.h"

namespace cu_fast {

// Sizes that keep a GPU busy; smaller ones for the emulation, so that small tests take every path.
struct SelectTuning {
#ifdef CU_FAST_EMULATED
  static constexpr int64_t kChunk = 72;        // more than a tile of scan_codes
  static constexpr int64_t kCandidates = 300;  // more than the 256 of a block of score_candidates
  static constexpr int64_t kCandidatesOfK = 0;
  static constexpr int64_t kSampleShare = 4, kSampleMost = 512;
  static constexpr double kScanStart = 0;
  static constexpr int64_t kFusedK = 12;
  static constexpr int64_t kTilesAtOnce = 2;
  static constexpr int64_t kRows = 136;  // more than a tile of exact scores
#else
  static constexpr int64_t kChunk = 1024;       // tokens per pass of the scan, at most
  static constexpr int64_t kCandidates = 2048;  // a row with more is scored against every code,
  static constexpr int64_t kCandidatesOfK =
      8;                                       // if it has more than 8 k too; the chunk is smaller for such k
  static constexpr int64_t kSampleShare = 16;  // one code in 16 gives the first threshold,
  static constexpr int64_t kSampleMost = 8192;    // but no more than so many, or 16 k
  static constexpr double kScanStart = 10;        // microseconds to launch the scan's kernels
  static constexpr int64_t kFusedK = 512;         // the largest k whose merged list is in shared memory
  static constexpr int64_t kTilesAtOnce = 65535;  // of scan_codes: gridDim.y <= 65535
  static constexpr int64_t kRows = 8192;  // of z in digits at a time: so their memory does not grow with T
#endif
};

// Codes per tile of scan_codes: 32 per warp.
inline constexpr int64_t kScanTile = 256;
// Maxima per group of the sample: one per four codes.
inline constexpr int64_t kMaximaOfGroup = kScanGroup / 4;

// A row's terms of approx and of its error (core/scan.h).
struct alignas(16) RowTerms {
  float unit;  // NaN: the scan cannot do this row
  float mean_dot, norm, miss;
  int32_t start[2];  // - kOffset * sum of a digit's bytes: cancels the codes' offset
};

// The scan's memory, for one chunk. K = ceil(E / 32), the steps of the byte product.
struct ScanWork {
  uint32_t* bytes;  // [ceil(chunk / 4), K, 2, 8, 4], two digits of each row; layout: scan_rows.cu
  RowTerms* terms;  // [chunk]
  float* maxima;    // [chunk, sample_groups * kMaximaOfGroup], the largest approximation of four codes each
  float* tau;       // [chunk], a guess of the k-th best score: a little below it
  float* reached;   // [chunk], at most the k-th best score; below tau, the guess was wrong
  int32_t* count;   // [chunk], candidates found; above plan.candidates, more than were stored
  int32_t* id;      // [chunk, candidates]; bit 31: deleted
  float *lower, *upper;  // [chunk, candidates]; lower is -inf for a deleted code: it must not raise tau
  float* scored;         // [chunk, candidates], the score, NaN until it is known
};

// Rows of z as integers (core/fixed.h), of one chunk.
struct FixedRows {
  int64_t width;   // digit_width(E)
  int8_t* digits;  // [chunk, 3, width], the highest first
  float* unit;     // [chunk]; NaN: a row with NaN or Inf, whose digits are zeros

  CU_FAST_BOTH int8_t* row(int64_t token) const { return digits + token * kDigits * width; }
};

struct SelectPlan {
  bool scans;
  int64_t chunk;                        // tokens per chunk
  int64_t tokens;                       // of a tile of select_exact
  int64_t parts, part_codes, capacity;  // of select_exact, and keys that each part keeps
  int64_t score_parts;                  // of score_candidates; at most parts
  int64_t candidates;                   // places per token
  int64_t sample_groups;                // of scan_codes, of 64 codes each
  int64_t rank;                         // in the sample, of the first threshold
};

// A selection, or a chunk of one, as its kernels see it. p.parts and p.capacity are the plan's; p.kept and
// p.deleted are [T, capacity, parts].
struct SelectJob {
  SelectParams p;
  SelectPlan plan;
  FixedRows rows;
  ScanWork work;
  uint64_t *merged, *merged_deleted;  // [T, k] if k > kFusedK, else null
};

// The width up to which the sums of a level, of three products of digits at most 2^7 in magnitude, fit into an
// int32 that one thread adds up alone.
inline constexpr int64_t kMostTensorWidth = (int64_t{1} << 31) / (3 << 14) / 64 * 64;

// Tokens of a tile of exact scores (cuda/fixed.h). Few: what counts is how fast codes are read. Very wide rows:
// a quad of threads shares their sums.
inline int64_t tile_tokens(int64_t T, int64_t E) {
  return T == 1 ? 1 : T <= 4 || E > kMostTensorWidth ? 4 : T <= 64 ? 16 : 128;
}

// Whether to scan: there is a plane, k is small enough, and the scan is predicted to be faster than scoring
// every code. It reads one byte per entry instead of three, and takes two products instead of nine, but launches
// more kernels. The prediction uses rates assumed for an H100 (benchmarks/roofline.py), not measurements.
inline bool select_scans(int64_t T, int64_t C, int64_t E, int64_t k, bool has_plane) {
  constexpr double kBytes = 3.35e6, kCached = 5.5e6, kByteProducts = 600e6;  // per microsecond
  const double entries = static_cast<double>(C) * E;
  const int64_t tile = tile_tokens(T, E), tiles = (T + tile - 1) / tile;  // each reads all codes
  const double exact = std::max({entries * kDigits / kBytes, tiles * entries * kDigits / kCached,
                                 T * entries * (kDigits * kDigits) / kByteProducts});
  const double scan = SelectTuning::kScanStart + std::max(entries / kBytes, 2 * T * entries / kByteProducts);
  return has_plane && k <= kMaxScanK && 8 * k <= C && scan < exact;
}

inline SelectPlan plan_select(int64_t T, int64_t C, int64_t E, int64_t k, bool has_plane,
                              int64_t multiprocessors) {
  const auto ceil_divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  SelectPlan plan = {};
  plan.scans = select_scans(T, C, E, k, has_plane);
  plan.candidates = std::max(SelectTuning::kCandidates, SelectTuning::kCandidatesOfK * k);
  const int64_t most =
      plan.scans ? SelectTuning::kChunk * SelectTuning::kCandidates / plan.candidates : SelectTuning::kRows;
  plan.chunk = std::max<int64_t>(1, std::min(T, most));
  // Two blocks per multiprocessor, if there are codes enough; a part is whole tiles of select_exact.
  constexpr int64_t kTile = 64;
  // After a scan few tokens are left, anywhere in the chunk: small tiles of tokens.
  plan.tokens = tile_tokens(plan.scans ? std::min<int64_t>(plan.chunk, 16) : plan.chunk, E);
  const int64_t token_tiles = ceil_divide(plan.chunk, plan.tokens);
  const int64_t parts = std::clamp<int64_t>(2 * multiprocessors / token_tiles, 1, ceil_divide(C, kTile));
  plan.part_codes = ceil_divide(ceil_divide(C, parts), kTile) * kTile;
  plan.parts = ceil_divide(C, plan.part_codes);
  plan.score_parts = std::clamp<int64_t>(2 * multiprocessors / plan.chunk, 1, plan.parts);
  plan.capacity = plan.scans ? k : std::min(k, plan.part_codes);
  const int64_t share = std::min(ceil_divide(C, SelectTuning::kSampleShare), SelectTuning::kSampleMost);
  plan.sample_groups = std::min(scan_groups(C), ceil_divide(std::max(share, 16 * k), kScanGroup));
  // So many of the k best should be in the sample; their number varies by its root.
  const double sampled =
      static_cast<double>(k) * std::min(plan.sample_groups * kScanGroup, C) / std::max<int64_t>(C, 1);
  plan.rank = static_cast<int64_t>(std::ceil(sampled + 3 * std::sqrt(sampled) + 1));
  return plan;
}

// Divides one allocation into arrays, 16-byte aligned. With a null base it only adds up the sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* const at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return at;
  }

  int64_t used() const { return used_; }

 private:
  char* const base_;
  int64_t used_ = 0;
};

// For up to this many rows.
inline FixedRows take_rows(int64_t rows, int64_t E, Arena& arena) {
  const int64_t width = digit_width(E);
  int8_t* const digits = arena.take<int8_t>(rows * kDigits * width);
  return {width, digits, arena.take<float>(rows)};
}

// Sets a job's arrays. Its p and plan are set before, and p.deleted is not null if hits are counted.
inline void take_memory(SelectJob& job, Arena& arena) {
  SelectParams& p = job.p;
  const SelectPlan& plan = job.plan;
  const bool counts_hits = p.deleted != nullptr;
  p.parts = plan.parts;
  p.capacity = plan.capacity;
  const int64_t keys = plan.chunk * plan.parts * plan.capacity;
  p.kept = arena.take<uint64_t>(keys);
  if (counts_hits) p.deleted = arena.take<uint64_t>(keys);
  job.merged = p.k > SelectTuning::kFusedK ? arena.take<uint64_t>(plan.chunk * p.k) : nullptr;
  job.merged_deleted =
      p.k > SelectTuning::kFusedK && counts_hits ? arena.take<uint64_t>(plan.chunk * p.k) : nullptr;
  job.rows = take_rows(plan.chunk, p.score.E, arena);
  if (!plan.scans) return;
  const int64_t steps = (p.score.E + 31) / 32, candidates = plan.chunk * plan.candidates;
  ScanWork& work = job.work;
  work.bytes = arena.take<uint32_t>((plan.chunk + 3) / 4 * steps * 64);
  work.terms = arena.take<RowTerms>(plan.chunk);
  work.maxima = arena.take<float>(plan.chunk * plan.sample_groups * kMaximaOfGroup);
  work.tau = arena.take<float>(plan.chunk);
  work.reached = arena.take<float>(plan.chunk);
  work.count = arena.take<int32_t>(plan.chunk);
  work.id = arena.take<int32_t>(candidates);
  work.lower = arena.take<float>(candidates);
  work.upper = arena.take<float>(candidates);
  work.scored = arena.take<float>(candidates);
}

// Calls run(job) for one chunk of the tokens after the other.
template <class Run>
void for_each_chunk(const SelectJob& job, const Run& run) {
  for (int64_t t = 0; t < job.p.score.T; t += job.plan.chunk) {
    SelectJob chunk = job;
    SelectParams& p = chunk.p;
    p.score.z = job.p.score.z.from_row(t);
    p.score.T = std::min(job.plan.chunk, job.p.score.T - t);
    if (p.mask.row != nullptr) p.mask.row += t;
    if (p.scores != nullptr) p.scores += t * p.k;
    if (p.ids != nullptr) p.ids += t * p.k;
    if (p.hits != nullptr) p.hits += t;
    run(chunk);
  }
}

}  // namespace cu_fast
