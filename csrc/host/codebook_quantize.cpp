// The k best codes of each token; a deleted one cannot be selected.
//
//   score(t, j) = <q_t, p_j> unit_t factor_j + bias_j        best: higher score, then smaller id
//   hits[t]     = deleted codes that would have been among them
//
// Checked: one device; shapes and dtypes; k; and, where values can be read, that every mask row exists.

#include <tuple>

#include "host/devices.h"
#include "registration.h"

namespace cu_fast {
namespace {

template <class Device>
std::tuple<Tensor, Tensor, Tensor> codebook_quantize(
    const Tensor& z, const Tensor& digits, const Tensor& factor, const OptionalTensor& bias, int64_t k,
    const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool return_hits,
    const OptionalTensor& scan_plane, const OptionalTensor& scan_terms, const OptionalTensor& scan_mean) {
  const Device device(z, "digits", digits, "factor", factor, "bias", bias, "mask_table", mask_table,
                      "mask_row", mask_row, "scan_plane", scan_plane, "scan_terms", scan_terms, "scan_mean",
                      scan_mean);
  const ScoreArguments in = score_arguments(kQuantizeNames, z, digits, factor, {}, bias);
  SelectArguments selected(in, {scan_plane, scan_terms, scan_mean}, k, {mask_table, mask_row},
                           Device::kValues);
  Tensor hits = device.empty({return_hits ? in.score.T : 0}, ScalarType::Int);
  if (return_hits) selected.p.hits = hits.mutable_data_ptr<int32_t>();
  const auto [scores, ids] = select(device, selected.p, return_hits && mask_table.has_value());
  return {scores, ids, hits};
}

}  // namespace
}  // namespace cu_fast

CU_FAST_OPERATORS(Device, m) {
  m.impl("codebook_quantize", TORCH_BOX(&cu_fast::codebook_quantize<Device>));
}
