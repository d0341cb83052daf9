// A selection on a GPU: how it is cut, and its memory. Plans are pure functions; no result depends on them.
//
//   every code scored   select_exact, finish
//   certified scan      scan_rows, scan_codes (sample), scan_threshold, scan_codes, score_candidates (first),
//                       score_candidates (rest), select_exact (rows that the scan could not do), finish
//
// Tokens go through the scan in chunks, so its memory does not grow with them.

#pragma once

#include <algorithm>

#include "core/params.h"

namespace cu_fast {

// Sizes to keep a GPU busy, and smaller ones for the emulation, whose tests are to take every path.
struct SelectTuning {
#ifdef CU_FAST_EMULATED
  static constexpr int64_t kChunk = 136;       // more than a tile of scan_codes
  static constexpr int64_t kCandidates = 300;  // more than a block of score_candidates looks at together
  static constexpr int64_t kSampleShare = 4;
  static constexpr double kScanStart = 0;
  static constexpr int64_t kFusedK = 12;
  static constexpr int64_t kTilesAtOnce = 2;
#else
  static constexpr int64_t kChunk = 256;          // tokens that go through the scan together
  static constexpr int64_t kCandidates = 8192;    // a row with more is scored against every code
  static constexpr int64_t kSampleShare = 16;     // one code in so many gives the first threshold
  static constexpr double kScanStart = 10;        // microseconds that the scan's kernels take to start
  static constexpr int64_t kFusedK = 512;         // a token's list that shared memory holds
  static constexpr int64_t kTilesAtOnce = 65535;  // of scan_codes: as many blocks as a grid may have
#endif
};

// Codes of a tile of scan_codes: 32 for each of its warps.
inline constexpr int64_t kScanTile = 256;
// Maxima that the sample leaves for a tile: of four codes each.
inline constexpr int64_t kMaximaOfTile = kScanTile / 4;

// What bounds the error of a row in the scan (core/scan.h).
struct alignas(16) RowTerms {
  float unit, mean_dot, norm_in, miss, half_l1_out, slop;
  int32_t start, high_start;  // minus kOffset times the sum of the bytes: undoes the offset of the codes
};

// The scan's memory, for a chunk. K = ceil(E / 32), the steps of the byte product.
struct ScanWork {
  float* z;              // [chunk, round_up(E, 16)], z - pre, zeros behind it
  uint32_t* bytes;       // [ceil(chunk / 8), K, 2, 8, 4], p: scan_rows.cu says how
  uint32_t* high;        // the same of h
  uint32_t* high_steps;  // [chunk, ceil(K / 32)], bit s: h is not zero in step s
  RowTerms* terms;       // [chunk]
  int32_t* exact;        // [chunk], 1: the row cannot be certified
  float* maxima;         // [chunk, sample_tiles * kMaximaOfTile], the largest lower bound of four codes each
  float* tau;            // [chunk], no better than the k-th best score
  int32_t* count;        // [chunk], candidates that wanted a place
  int32_t* id;           // [chunk, kCandidates]; bit 31: deleted
  float *lower, *upper;  // [chunk, kCandidates]; lower is -inf for a deleted code: it says nothing of tau
  float* scored;         // [chunk, kCandidates], the canonical score, NaN until it is known
};

struct SelectPlan {
  bool scans;
  int64_t chunk;                        // tokens at a time
  int64_t parts, part_codes, capacity;  // of select_exact, and keys that each part keeps
  int64_t score_parts;                  // of score_candidates; at most parts
  int64_t sample_tiles;                 // of scan_codes
};

// A selection, or a chunk of one, as its kernels see it. p.parts and p.capacity are the plan's; kept and
// deleted are [T, capacity, parts].
struct SelectJob {
  SelectParams p;
  SelectPlan plan;
  ScanWork work;
  uint64_t *merged, *merged_deleted;  // [T, k] if k > kFusedK, else null
};

// Whether the scan is there, allowed, and predicted to be faster than scoring every code: by the rates of an
// H100, not measured. It reads a byte an entry, but starts more kernels.
inline bool select_scans(int64_t T, int64_t C, int64_t E, int64_t k, int64_t code_bytes, bool has_plane) {
  constexpr double kBytes = 3.35e6, kProducts = 16.7e6, kByteProducts = 600e6;  // a microsecond
  const double entries = static_cast<double>(C) * E;
  const double exact = std::max(entries * code_bytes / kBytes, T * entries / kProducts);
  const double scan = SelectTuning::kScanStart + std::max(entries / kBytes, T * entries / kByteProducts);
  return has_plane && k <= kMaxScanK && 8 * k <= C && scan < exact;
}

inline SelectPlan plan_select(int64_t T, int64_t C, int64_t E, int64_t k, int64_t code_bytes, bool has_plane,
                              int64_t multiprocessors) {
  const auto ceil_divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  SelectPlan plan = {};
  plan.scans = select_scans(T, C, E, k, code_bytes, has_plane);
  plan.chunk = std::max<int64_t>(1, std::min(T, plan.scans ? SelectTuning::kChunk : int64_t{1} << 18));
  // Enough blocks for two on every multiprocessor; a part is whole tiles of select_exact.
  constexpr int64_t kTile = 64;
  const int64_t token_tiles = ceil_divide(plan.chunk, plan.chunk <= 4 ? 4 : 16);
  const int64_t parts = std::clamp<int64_t>(2 * multiprocessors / token_tiles, 1, ceil_divide(C, kTile));
  plan.part_codes = ceil_divide(ceil_divide(C, parts), kTile) * kTile;
  plan.parts = ceil_divide(C, plan.part_codes);
  plan.score_parts = std::clamp<int64_t>(2 * multiprocessors / plan.chunk, 1, plan.parts);
  plan.capacity = plan.scans ? k : std::min(k, plan.part_codes);
  const int64_t tiles = ceil_divide(C, kScanTile);
  plan.sample_tiles = std::min(
      tiles, std::max(ceil_divide(tiles, SelectTuning::kSampleShare), ceil_divide(16 * k, kScanTile)));
  return plan;
}

// Cuts one piece of memory into arrays, 16-byte aligned. With a null base it only counts.
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

// Gives a job its memory. p and plan are set, and p.deleted is not null if deleted codes ride along.
inline void take_memory(SelectJob& job, Arena& arena) {
  SelectParams& p = job.p;
  const SelectPlan& plan = job.plan;
  const bool rides_along = p.deleted != nullptr;
  p.parts = plan.parts;
  p.capacity = plan.capacity;
  const int64_t keys = plan.chunk * plan.parts * plan.capacity;
  p.kept = arena.take<uint64_t>(keys);
  if (rides_along) p.deleted = arena.take<uint64_t>(keys);
  job.merged = p.k > SelectTuning::kFusedK ? arena.take<uint64_t>(plan.chunk * p.k) : nullptr;
  job.merged_deleted =
      p.k > SelectTuning::kFusedK && rides_along ? arena.take<uint64_t>(plan.chunk * p.k) : nullptr;
  if (!plan.scans) return;
  const int64_t steps = (p.score.E + 31) / 32, candidates = plan.chunk * SelectTuning::kCandidates;
  const int64_t fragments = (plan.chunk + 7) / 8 * steps * 64;
  ScanWork& work = job.work;
  work.z = arena.take<float>(plan.chunk * round_up(p.score.E, kLanes));
  work.bytes = arena.take<uint32_t>(fragments);
  work.high = arena.take<uint32_t>(fragments);
  work.high_steps = arena.take<uint32_t>(plan.chunk * ((steps + 31) / 32));
  work.terms = arena.take<RowTerms>(plan.chunk);
  work.exact = arena.take<int32_t>(plan.chunk);
  work.maxima = arena.take<float>(plan.chunk * plan.sample_tiles * kMaximaOfTile);
  work.tau = arena.take<float>(plan.chunk);
  work.count = arena.take<int32_t>(plan.chunk);
  work.id = arena.take<int32_t>(candidates);
  work.lower = arena.take<float>(candidates);
  work.upper = arena.take<float>(candidates);
  work.scored = arena.take<float>(candidates);
}

// Calls run(job) for a chunk of the tokens at a time.
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
