// A selection on a GPU: how it is cut, and its memory. Plans are pure functions; no result depends on them, nor on what
// they are made of: a card's rates, and what is predicted with them (cuda/predict.h).
//
//   every code scored   fix_rows, select_exact, finish
//   certified scan      scan_rows, scan_codes (sample), scan_threshold, scan_codes, score_candidates (first),
//                       score_candidates (rest), select_exact (rows that the scan could not do), finish
//
// Tokens go in chunks, so that memory does not grow with T, and stays below SelectTuning::kMostMemory.

#pragma once

#include <algorithm>
#include <cmath>

#include "core/params.h"
#include "cuda/predict.h"

namespace cu_fast {

// Sizes that keep a GPU busy; smaller ones for the emulation, so that small tests take every path.
struct SelectTuning {
#ifdef CU_FAST_EMULATED
  static constexpr int64_t kChunk = 72;        // more than a tile of scan_codes
  static constexpr int64_t kCandidates = 300;  // more than the 256 of a block of score_candidates
  static constexpr int64_t kCandidatesOfK = 0;
  static constexpr int64_t kSampleShare = 4, kSampleMost = 512;
  static constexpr bool kScansIfPossible = true;
  static constexpr int64_t kFusedK = 12;
  static constexpr int kHeld = 1;  // fewer than the candidates that there may be
  static constexpr int64_t kTilesAtOnce = 2;
  static constexpr int kResidentSteps = 8;
  static constexpr int64_t kRows = 136;  // more than a tile of exact scores
  static constexpr int64_t kMostMemory = int64_t{2} << 20;
#else
  static constexpr int64_t kChunk = 1024;       // tokens per pass of the scan, at most
  static constexpr int64_t kCandidates = 2048;  // a row with more is scored against every code,
  static constexpr int64_t kCandidatesOfK =
      8;                                       // if it has more than 8 k too; the chunk is smaller for such k
  static constexpr int64_t kSampleShare = 16;  // one code in 16 gives the first threshold,
  static constexpr int64_t kSampleMost = 8192;     // but no more than so many, or 16 k
  static constexpr bool kScansIfPossible = false;  // else if it is predicted to be faster
  static constexpr int64_t kFusedK = 1024;         // the largest k whose merged list is in shared memory
  static constexpr int kHeld = 8;                  // words per thread that a block loads at once
  static constexpr int64_t kTilesAtOnce = 65535;   // of scan_codes: gridDim.y <= 65535
  // Of 32 entries: what a block of scan_codes_sm90 has shared memory for.
  static constexpr int kResidentSteps = 52;
  static constexpr int64_t kRows = 8192;  // of z in digits at a time: so their memory does not grow with T
  // Bytes of a selection's memory, and of the encoder's. One token may need more, where k or the sample is huge.
  static constexpr int64_t kMostMemory = int64_t{512} << 20;
#endif
};

// Microseconds that a chain of dependent kernels takes beyond its work: about nine of a scan, three where every code
// is scored. Estimates.
inline constexpr double kScanStart = 50, kExactStart = 5;

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
  float *lower, *upper;   // [chunk, candidates]; lower is -inf for a deleted code: it must not raise tau
  float *scored, *exact;  // [chunk, candidates], scores, else NaN: after the first pass, and after both
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
  int64_t score_parts;                  // blocks per token of score_candidates
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

// What is predicted of a selection: microseconds of both ways; per row, for normal codes, the candidates of a
// scan and those that are scored.
struct SelectPrediction {
  double exact, scan, candidates, scored;
};

// Of a plan, only the sample and the places for candidates are looked at. The scan reads one byte per entry instead
// of three, and takes two products instead of nine, but starts more kernels and scores candidates.
inline SelectPrediction predict_select(int64_t T, int64_t C, int64_t E, int64_t k, const SelectPlan& plan,
                                       const Card& card) {
  const auto tiles_of = [&](int64_t tile) { return static_cast<double>((T + tile - 1) / tile); };
  const Peaks rates = rates_of(card);
  const double codes = static_cast<double>(std::max<int64_t>(C, 1)), entries = codes * E, tokens = T;
  SelectPrediction made = {};
  const int64_t tile = tile_tokens(T, E);  // each reads all codes, and each 64 codes all tokens
  const double products = tile <= 4 ? rates.dot_products : T <= 64 ? rates.products : rates.many_products;
  made.exact = kExactStart + std::max({entries * kDigits / rates.memory,
                                       (tiles_of(tile) + tokens / 64) * entries * kDigits / rates.cache,
                                       tokens * entries * (kDigits * kDigits) / products});
  // The threshold is the maximum of plan.rank among those of the sample, each of a few codes.
  constexpr double kOfMaximum = static_cast<double>(kScanGroup) / kMaximaOfGroup;
  const double sampled = std::min(codes, static_cast<double>(plan.sample_groups * kScanGroup));
  const double above = std::min(1.0, plan.rank * kOfMaximum / std::max(sampled, 1.0));
  made.candidates = codes_reaching(1 - std::pow(1 - above, 1 / kOfMaximum), C, E);
  made.scored = codes_reaching(k / codes, C, E);
  // Each tile of codes reads a tile's digits too, unless they stay in shared memory.
  const int64_t scan_tile = T <= 4 ? 4 : T <= 8 ? 8 : T <= 32 ? 32 : 64;
  const bool resident =
      card.major == 9 && card.minor == 0 && T > 32 && E <= 32 * SelectTuning::kResidentSteps;
  const double cached = resident ? 1 : 1 + 2.0 * scan_tile / kScanTile;
  const double chunks = tiles_of(SelectTuning::kChunk * SelectTuning::kCandidates / plan.candidates);
  made.scan =
      kScanStart * chunks +
      (1 + sampled / codes) *
          std::max({chunks * entries / rates.memory, tiles_of(scan_tile) * entries * cached / rates.cache,
                    2 * tokens * entries / (T <= 32 ? rates.products : rates.many_products)}) +
      tokens * made.scored * E * std::max(kDigits / rates.cache, kDigits * kDigits / rates.dot_products);
  return made;
}

inline bool may_scan(int64_t C, int64_t k, bool has_plane) {
  return has_plane && k <= kMaxScanK && 8 * k <= C;
}

// Whether to scan: there is a plane, k is small enough, and the scan is predicted to have places for its candidates,
// and to be faster than scoring every code.
inline bool select_scans(int64_t T, int64_t C, int64_t E, int64_t k, bool has_plane, const SelectPlan& plan,
                         const Card& card) {
  if (!may_scan(C, k, has_plane)) return false;
  if (SelectTuning::kScansIfPossible) return true;
  const SelectPrediction predicted = predict_select(T, C, E, k, plan, card);
  return predicted.candidates <= plan.candidates && predicted.scan < predicted.exact;
}

// Of take_memory, for plan.chunk tokens whose hits are counted.
inline int64_t memory_of(const SelectPlan& plan, int64_t E, int64_t k);

inline SelectPlan plan_select(int64_t T, int64_t C, int64_t E, int64_t k, bool has_plane, const Card& card) {
  const auto ceil_divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  SelectPlan plan = {};
  plan.candidates = std::max(SelectTuning::kCandidates, SelectTuning::kCandidatesOfK * k);
  const int64_t share = std::min(ceil_divide(C, SelectTuning::kSampleShare), SelectTuning::kSampleMost);
  plan.sample_groups = std::min(scan_groups(C), ceil_divide(std::max(share, 16 * k), kScanGroup));
  // So many of the k best should be in the sample; their number varies by its root.
  const double sampled =
      static_cast<double>(k) * std::min(plan.sample_groups * kScanGroup, C) / std::max<int64_t>(C, 1);
  plan.rank = static_cast<int64_t>(std::ceil(sampled + 3 * std::sqrt(sampled) + 1));
  plan.scans = select_scans(T, C, E, k, has_plane, plan, card);
  const int64_t most =
      plan.scans ? SelectTuning::kChunk * SelectTuning::kCandidates / plan.candidates : SelectTuning::kRows;
  plan.chunk = std::max<int64_t>(1, std::min(T, most));
  // Two blocks per multiprocessor, if there are codes enough; a part is whole tiles of select_exact.
  constexpr int64_t kTile = 64;
  const auto cut = [&](int64_t blocks) {
    // After a scan few tokens are left, anywhere in the chunk: small tiles of tokens.
    plan.tokens = tile_tokens(plan.scans ? std::min<int64_t>(plan.chunk, 16) : plan.chunk, E);
    const int64_t token_tiles = ceil_divide(plan.chunk, plan.tokens);
    const int64_t parts = std::clamp<int64_t>(blocks / token_tiles, 1, ceil_divide(C, kTile));
    plan.part_codes = ceil_divide(ceil_divide(C, parts), kTile) * kTile;
    plan.parts = ceil_divide(C, plan.part_codes);
    plan.score_parts = std::max<int64_t>(1, 2 * card.multiprocessors / plan.chunk);
    plan.capacity = std::min(k, plan.part_codes);
  };
  cut(2 * card.multiprocessors);
  // Too large: fewer tokens at a time, and of one token fewer parts.
  while (plan.chunk > 1 && memory_of(plan, E, k) > SelectTuning::kMostMemory) {
    plan.chunk = ceil_divide(plan.chunk, 2);
    cut(2 * card.multiprocessors);
  }
  while (plan.parts > 1 && memory_of(plan, E, k) > SelectTuning::kMostMemory) cut(plan.parts / 2);
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

// Rows of width E that take_rows is asked for at a time.
inline int64_t rows_at_once(int64_t rows, int64_t E) {
  const int64_t most =
      SelectTuning::kMostMemory / (kDigits * digit_width(E) + 32);  // with a unit, and two ends of 16 bytes
  return std::min({rows, SelectTuning::kRows, most});
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
  work.exact = arena.take<float>(candidates);
}

inline int64_t memory_of(const SelectPlan& plan, int64_t E, int64_t k) {
  SelectJob job = {};
  uint64_t counted = 0;
  job.plan = plan;
  job.p.score.E = E;
  job.p.k = k;
  job.p.deleted = &counted;
  Arena arena(nullptr);
  take_memory(job, arena);
  return arena.used();
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
