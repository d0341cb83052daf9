// The whole bottleneck in one call: encode, select, weigh, decode. At T = 1 three calls from Python, each
// with its checks, cost about as much as the kernels.
//
//   z = act((x - b_pre) W_enc^T + b_enc), or x        y[t] = reduce_i(w_i table[ids_i]) + b_dec
//
// A mask takes deleted codes out of the selection (reselect), or out of the sum. Checked: what sae_encode,
// codebook_quantize and masked_decode check.

#include "host/devices.h"
#include "registration.h"

namespace cu_fast {
namespace {

template <class Device>
Tensor codebook_bottleneck(const Tensor& x, const OptionalTensor& W_digits, const OptionalTensor& W_factor,
                           const OptionalTensor& b_enc, const OptionalTensor& b_pre, bool relu,
                           const Tensor& digits, const Tensor& factor, const OptionalTensor& bias, int64_t k,
                           const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool reselect,
                           const OptionalTensor& scan_plane, const OptionalTensor& scan_terms,
                           const OptionalTensor& scan_mean, const Tensor& table_in,
                           const OptionalTensor& b_dec_in, bool score_weights, bool mean,
                           const OptionalTensor& receipt_in) {
  const Device device(x, "W_digits", W_digits, "W_factor", W_factor, "b_enc", b_enc, "b_pre", b_pre, "digits",
                      digits, "factor", factor, "bias", bias, "mask_table", mask_table, "mask_row", mask_row,
                      "scan_plane", scan_plane, "scan_terms", scan_terms, "scan_mean", scan_mean, "table",
                      table_in, "b_dec", b_dec_in, "receipt", receipt_in);
  int64_t* const receipt = receipt_of(receipt_in);
  check(W_digits.has_value() == W_factor.has_value(), "W_digits and W_factor must be given together");
  const Tensor z =
      W_digits ? encode(device, score_arguments(kEncodeNames, x, *W_digits, *W_factor, b_pre, b_enc), relu)
               : x;
  const ScoreArguments in = score_arguments(kQuantizeNames, z, digits, factor, {}, bias);
  const int64_t T = in.score.T, C = in.score.C;
  const MaskTensors mask = {mask_table, mask_row};
  const OptionalTensor none;
  const SelectArguments selected(in, {scan_plane, scan_terms, scan_mean}, k,
                                 reselect ? mask : MaskTensors{none, none}, Device::kValues);
  const MaskArguments ablated(reselect ? MaskTensors{none, none} : mask, T, C, Device::kValues);
  check_shape("table", table_in, "[C, D]", {C, -1});
  check_float("table", table_in);
  const Tensor table = with_contiguous_rows(table_in);
  const int64_t D = table.size(1);
  const OptionalTensor b_dec = as_fp32("b_dec", b_dec_in, "[D]", {D});
  Tensor y = device.empty({T, D}, table.scalar_type());

  const DecodeParams decode = {.table = matrix_of(table),
                               .bias = data_of(b_dec),
                               .mask = ablated.mask(),
                               .mean = mean,
                               .T = T,
                               .C = C,
                               .D = D,
                               .k = k,
                               .y = y.mutable_data_ptr()};
  device.bottleneck(selected.p, reselect && mask_table.has_value(), score_weights, decode, receipt);
  return y;
}

}  // namespace
}  // namespace cu_fast

CU_FAST_OPERATORS(Device, m) {
  m.impl("codebook_bottleneck", TORCH_BOX(&cu_fast::codebook_bottleneck<Device>));
}
