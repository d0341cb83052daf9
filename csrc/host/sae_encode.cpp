// The encoder: dense, and with k, which is a selection whose codes are the rows of W_enc.
//
//   z[t] = act((x_t - b_pre) W_enc^T + b_enc)        act: relu, or nothing; with k the order is that of raw
//   scores
//
// Checked: one device; shapes and dtypes; with k what codebook_quantize checks.

#include <tuple>

#include "host/devices.h"
#include "registration.h"

namespace cu_fast {
namespace {

template <class Device>
Tensor sae_encode(const Tensor& x, const Tensor& W_digits, const Tensor& W_factor,
                  const OptionalTensor& b_enc, const OptionalTensor& b_pre, bool relu) {
  const Device device(x, "W_digits", W_digits, "W_factor", W_factor, "b_enc", b_enc, "b_pre", b_pre);
  return encode(device, score_arguments(kEncodeNames, x, W_digits, W_factor, b_pre, b_enc), relu);
}

template <class Device>
std::tuple<Tensor, Tensor> sae_encode_topk(const Tensor& x, const Tensor& W_digits, const Tensor& W_factor,
                                           const OptionalTensor& b_enc, const OptionalTensor& b_pre,
                                           int64_t k, const OptionalTensor& mask_table,
                                           const OptionalTensor& mask_row, bool relu,
                                           const OptionalTensor& scan_plane, const OptionalTensor& scan_terms,
                                           const OptionalTensor& scan_mean) {
  const Device device(x, "W_digits", W_digits, "W_factor", W_factor, "b_enc", b_enc, "b_pre", b_pre,
                      "mask_table", mask_table, "mask_row", mask_row, "scan_plane", scan_plane, "scan_terms",
                      scan_terms, "scan_mean", scan_mean);
  const ScoreArguments in = score_arguments(kEncodeNames, x, W_digits, W_factor, b_pre, b_enc);
  SelectArguments selected(in, {scan_plane, scan_terms, scan_mean}, k, {mask_table, mask_row},
                           Device::kValues);
  selected.p.relu = relu;
  return select(device, selected.p, /*counts_hits=*/false);
}

}  // namespace
}  // namespace cu_fast

CU_FAST_OPERATORS(Device, m) {
  m.impl("sae_encode", TORCH_BOX(&cu_fast::sae_encode<Device>));
  m.impl("sae_encode_topk", TORCH_BOX(&cu_fast::sae_encode_topk<Device>));
}
