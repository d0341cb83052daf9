// Host side: checks, cuts the work into blocks, runs the scan, then writes what its heaps hold.
// The scan itself: codebook_quantize-inl.h.

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <tuple>

#include "core/order.h"
#include "cpu/grid.h"
#include "cpu/kernels.h"
#include "cpu/operators.h"
#include "cpu/parallel.h"
#include "cpu/scan.h"
#include "cpu/select.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>

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

std::tuple<Tensor, Tensor, Tensor> codebook_quantize(
    const Tensor& z, const Tensor& codes, const OptionalTensor& inv_norm, const OptionalTensor& bias,
    int64_t k, const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool return_hits,
    const OptionalTensor& scan_plane, const OptionalTensor& scan_terms, const OptionalTensor& scan_mean) {
  const ScoreArguments in = quantize_arguments(z, codes, inv_norm, bias);
  const ScanArguments scan(scan_plane, scan_terms, scan_mean, in.score.C, in.score.E);
  SelectResult result = select(in.score, data_of(in.inv_norm), data_of(in.bias), scan.plane(), k, mask_table,
                               mask_row, return_hits, /*relu=*/false);
  return {result.scores, result.ids, result.hits};
}

SelectResult select(const ScoreParams& score, const float* inv_norm, const float* bias,
                    const ScanPlane& scan_plane, int64_t k, const OptionalTensor& mask_table,
                    const OptionalTensor& mask_row, bool return_hits, bool relu) {
  const int64_t T = score.T, C = score.C;
  check_selection(k, C);
  const MaskArguments mask(mask_table, mask_row, T, C);

  SelectResult result{new_tensor({T, k}, ScalarType::Float), new_tensor({T, k}, ScalarType::Int),
                      new_tensor({return_hits ? T : 0}, ScalarType::Int)};
  const auto exact = CU_FAST_DISPATCH(select_exact), scan = CU_FAST_DISPATCH(select_scan);
  if (T == 0) return result;

  const float largest_bias = largest_magnitude(bias, C);
  const auto [scans, grid] = plan_selection(T, C, score.E, k, torch::stable::get_num_threads(),
                                            scan_plane.plane != nullptr, largest_bias);
  const int64_t capacity = std::min(k, grid.part_codes);
  const bool rides_along = return_hits && mask_table.has_value();
  const int64_t places = grid.parts * capacity;
  Tensor kept = new_tensor({T, places}, ScalarType::Long);
  Tensor deleted = new_tensor({rides_along ? T : 0, places}, ScalarType::Long);
  const SelectParams p{score,
                       inv_norm,
                       bias,
                       scan_plane,
                       largest_bias,
                       mask.mask(),
                       k,
                       grid.parts,
                       capacity,
                       static_cast<uint64_t*>(kept.mutable_data_ptr()),
                       rides_along ? static_cast<uint64_t*>(deleted.mutable_data_ptr()) : nullptr,
                       relu,
                       result.scores.mutable_data_ptr<float>(),
                       result.ids.mutable_data_ptr<int32_t>(),
                       return_hits ? result.hits.mutable_data_ptr<int32_t>() : nullptr};
  const int64_t floats = round_up(scratch_floats(score) + (scans ? ScanScratch(p).floats() : 0), kLanes);
  Tensor scratch = new_tensor({grid.workers, floats}, ScalarType::Float);
  float* const scratch_data = scratch.mutable_data_ptr<float>();
  parallel(grid.workers, grid.size(), [&](int64_t worker, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      (scans ? scan : exact)(p, grid.block(i), scratch_data + worker * floats);
  });
  parallel(std::min(grid.workers, T), T, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) select_finish(p, token);
  });
  return result;
}

namespace {

std::string selection_plan(int64_t T, int64_t C, int64_t E, int64_t k, int64_t threads, bool scan) {
  const auto [scans, grid] = plan_selection(T, C, E, k, threads, scan, /*largest_bias=*/0);
  std::ostringstream text;
  text << (scans ? "int8 scan" : "every code scored") << ": " << grid.token_blocks << " x "
       << grid.block_tokens << " tokens, " << grid.parts << " x " << grid.part_codes << " codes, "
       << grid.workers << " threads";
  return text.str();
}

}  // namespace
}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CompositeExplicitAutograd, m) {
  m.impl("selection_plan", TORCH_BOX(&cu_fast::selection_plan));
}

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CPU, m) {
  m.impl("codebook_quantize", TORCH_BOX(&cu_fast::codebook_quantize));
}
