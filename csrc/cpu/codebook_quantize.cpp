// A selection on the CPU: cuts the work into blocks, fills heaps by scoring or scanning, then writes what
// they hold. The kernels: codebook_quantize-inl.h, codebook_quantize_scan-inl.h.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/order.h"
#include "cpu/grid.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scan.h"
#include "cpu/simd.h"
#include "host/cpu.h"

namespace cu_fast {
namespace {

// Brings the k best of n keys to the front, best first.
void best_first(uint64_t* keys, int64_t k, int64_t n) {
  std::partial_sort(keys, keys + k, keys + n, std::greater<>());
}

// How many of the k best codes would be deleted ones, had they been let in. Both lists are sorted.
int32_t count_hits(const uint64_t* kept, const uint64_t* deleted, int64_t k) {
  int32_t hits = 0;
  for (int64_t place = 0, i = 0; place < k; ++place) {
    if (deleted[hits] > kept[i]) {
      ++hits;
    } else {
      ++i;
    }
  }
  return hits;
}

// Of a bias; NaN counts as infinite, null as 0.
float largest_magnitude(const float* x, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; x != nullptr && i < n; ++i) {
    const float magnitude = std::abs(x[i]);
    if (!(magnitude <= largest))
      largest = magnitude == magnitude ? magnitude : std::numeric_limits<float>::infinity();
  }
  return largest;
}

// Merges the parts' heaps of one token and writes its results.
void select_finish(const SelectParams& p, int64_t token) {
  const int64_t places = p.parts * p.capacity;
  uint64_t* const kept = p.kept + token * places;
  uint64_t* const deleted = p.deleted == nullptr ? nullptr : p.deleted + token * places;
  float* const scores = p.scores + token * p.k;
  int32_t* const ids = p.ids + token * p.k;

  best_first(kept, p.k, places);
  if (kept[0] == kPoison) {
    std::fill_n(scores, p.k, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(ids, p.k, -1);
    if (p.hits != nullptr) p.hits[token] = 0;
    return;
  }
  for (int64_t i = 0; i < p.k; ++i) {
    const bool taken = kept[i] != kEmpty;
    const float score = taken ? score_of(kept[i]) : 0.0f;
    scores[i] = p.relu && score < 0 ? 0.0f : score;
    ids[i] = taken ? id_of(kept[i]) : -1;
  }
  if (p.hits == nullptr) return;
  if (deleted != nullptr) best_first(deleted, p.k, places);
  p.hits[token] = deleted == nullptr ? 0 : count_hits(kept, deleted, p.k);
}

}  // namespace

void Cpu::select(SelectParams p, bool counts_hits) const {
  const auto exact = CU_FAST_DISPATCH_TILES(select_exact), scan = CU_FAST_DISPATCH_TILES(select_scan);
  const int64_t T = p.score.T, C = p.score.C;
  if (T == 0) return;

  p.largest_bias = largest_magnitude(p.score.bias, C);
  const auto [scans, grid] = plan_selection(T, C, p.score.E, p.k, torch::stable::get_num_threads(),
                                            p.scan.plane != nullptr, p.largest_bias);
  p.parts = grid.parts;
  p.capacity = std::min(p.k, grid.part_codes);
  const int64_t places = p.parts * p.capacity;
  Tensor kept = empty({T, places}, ScalarType::Long);
  Tensor deleted = empty({counts_hits ? T : 0, places}, ScalarType::Long);
  p.kept = static_cast<uint64_t*>(kept.mutable_data_ptr());
  p.deleted = counts_hits ? static_cast<uint64_t*>(deleted.mutable_data_ptr()) : nullptr;

  const int64_t floats = round_up(scratch_floats(p.score) + (scans ? ScanScratch(p).floats() : 0), kLanes);
  Tensor scratch = empty({grid.workers, floats}, ScalarType::Float);
  float* const scratch_data = scratch.mutable_data_ptr<float>();
  parallel(grid.workers, grid.size(), [&](int64_t worker, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      (scans ? scan : exact)(p, grid.block(i), scratch_data + worker * floats);
  });
  parallel(std::min(grid.workers, T), T, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) select_finish(p, token);
  });
}

}  // namespace cu_fast
