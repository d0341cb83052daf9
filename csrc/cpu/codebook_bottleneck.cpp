// The whole bottleneck in one call: encode, select, weigh, decode. At T = 1 three calls from Python, each
// with its checks, cost about as much as the kernels.

#include <optional>

#include "core/mask.h"
#include "cpu/operators.h"

#include <torch/csrc/stable/library.h>

namespace cu_fast {
namespace {

// The weights of a selection, in place of its scores: relu(score), or 1. An empty slot keeps its 0, or its
// NaN, which tells the decoder that the row was faulty. Returns how many of the codes are deleted.
int64_t weigh(const Tensor& ids_in, Tensor& scores, bool score_weights, const Mask& mask) {
  const int64_t T = scores.size(0), k = scores.size(1);
  const int32_t* const ids = ids_in.const_data_ptr<int32_t>();
  float* const weights = scores.mutable_data_ptr<float>();
  int64_t taken = 0;
  for (int64_t t = 0; t < T; ++t) {
    const uint32_t* const bits = mask.bits(t);
    for (int64_t i = t * k; i < (t + 1) * k; ++i) {
      if (ids[i] < 0) continue;
      weights[i] = !score_weights ? 1.0f : weights[i] > 0 ? weights[i] : 0.0f;
      taken += is_deleted(bits, ids[i]);
    }
  }
  return taken;
}

Tensor codebook_bottleneck(const Tensor& x, const OptionalTensor& W_enc, const OptionalTensor& b_enc,
                           const OptionalTensor& b_pre, bool relu, const Tensor& codes,
                           const OptionalTensor& inv_norm, const OptionalTensor& bias, int64_t k,
                           const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool reselect,
                           const OptionalTensor& scan_plane, const OptionalTensor& scan_terms,
                           const OptionalTensor& scan_mean, const Tensor& table, const OptionalTensor& b_dec,
                           bool score_weights, bool mean, std::optional<Tensor> receipt) {
  check_receipt(receipt);
  const bool masked = mask_table.has_value() || mask_row.has_value();
  const bool reselects = masked && reselect, ablates = masked && !reselect;
  const OptionalTensor none;
  const Tensor z = W_enc ? sae_encode(x, *W_enc, b_enc, b_pre, relu) : x;
  auto [scores, ids, hits] =
      codebook_quantize(z, codes, inv_norm, bias, k, reselects ? mask_table : none,
                        reselects ? mask_row : none, reselects, scan_plane, scan_terms, scan_mean);
  const MaskArguments ablated(ablates ? mask_table : none, ablates ? mask_row : none, x.size(0),
                              codes.size(0));
  int64_t taken = weigh(ids, scores, score_weights, ablated.mask());
  for (int64_t t = 0; t < hits.numel(); ++t) taken += hits.const_data_ptr<int32_t>()[t];
  Tensor y = masked_decode(ids, scores, table, b_dec, none, ablates ? mask_table : none,
                           ablates ? mask_row : none, mean);
  if (receipt) {
    int64_t* const counts = receipt->mutable_data_ptr<int64_t>();
    counts[0] += x.size(0);
    counts[1] += taken;
  }
  return y;
}

}  // namespace
}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CPU, m) {
  m.impl("codebook_bottleneck", TORCH_BOX(&cu_fast::codebook_bottleneck));
}
