// The whole bottleneck on a GPU: encode, select, and a kernel that ends the selection and decodes. With every
// code scored these are three launches.

#include "cuda/host.h"
#include "cuda/kernels.h"

namespace cu_fast {
namespace {

Tensor codebook_bottleneck(const Tensor& x, const OptionalTensor& W_enc, const OptionalTensor& b_enc,
                           const OptionalTensor& b_pre, bool relu, const Tensor& codes,
                           const OptionalTensor& inv_norm, const OptionalTensor& bias, int64_t k,
                           const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool reselect,
                           const OptionalTensor& scan_plane, const OptionalTensor& scan_terms,
                           const OptionalTensor& scan_mean, const Tensor& table_in,
                           const OptionalTensor& b_dec_in, bool score_weights, bool mean,
                           std::optional<Tensor> receipt) {
  check_device(x, {{"W_enc", W_enc},
                   {"b_enc", b_enc},
                   {"b_pre", b_pre},
                   {"codes", codes},
                   {"inv_norm", inv_norm},
                   {"bias", bias},
                   {"mask_table", mask_table},
                   {"mask_row", mask_row},
                   {"scan_plane", scan_plane},
                   {"scan_terms", scan_terms},
                   {"scan_mean", scan_mean},
                   {"table", table_in},
                   {"b_dec", b_dec_in},
                   {"receipt", receipt}});
  check_receipt(receipt);
  const OnDevice device(x);
  Tensor z = x;
  if (W_enc) {
    const ScoreArguments in = encode_arguments(x, *W_enc, b_enc, b_pre);
    z = new_tensor(x, {in.score.T, in.score.C}, ScalarType::Float);
    launch_sae_encode({in.score, data_of(in.bias), relu, z.mutable_data_ptr<float>()}, device.stream());
  }
  const ScoreArguments in = quantize_arguments(z, codes, inv_norm, bias);
  const int64_t T = in.score.T, C = in.score.C;
  check_shape("table", table_in, "[C, D]", {C, -1});
  check_float("table", table_in);
  const Tensor table = with_contiguous_rows(table_in);
  const int64_t D = table.size(1);
  const OptionalTensor b_dec = as_fp32("b_dec", b_dec_in, "[D]", {D});
  const ScanArguments scan(scan_plane, scan_terms, scan_mean, C, in.score.E);
  const MaskArguments mask(mask_table, mask_row, T, C, Values::on_device);
  const Mask none = {};
  const SelectMemory memory(z, in.score, data_of(in.inv_norm), data_of(in.bias),
                            scan.plane(Values::on_device), reselect ? mask.mask() : none, k,
                            reselect && mask_table.has_value());
  Tensor y = new_tensor(x, {T, D}, table.scalar_type());
  if (y.numel() == 0) return y;
  launch_codebook_bottleneck(
      {memory.job, reselect ? none : mask.mask(), score_weights, mean, matrix_of(table), data_of(b_dec), D,
       y.mutable_data_ptr(), receipt ? receipt->mutable_data_ptr<int64_t>() : nullptr},
      device.stream());
  return y;
}

}  // namespace
}  // namespace cu_fast

CU_FAST_IMPLEMENTATION(CU_FAST_NAMESPACE, CU_FAST_GPU, m) {
  m.impl("codebook_bottleneck", TORCH_BOX(&cu_fast::codebook_bottleneck));
}
