// Host side of the encoder on a GPU: dense (sae_encode.cu), and with k (codebook_quantize.cu).

#include <tuple>

#include "cuda/host.h"
#include "cuda/kernels.h"

namespace cu_fast {
namespace {

Tensor sae_encode(const Tensor& x, const Tensor& W_enc, const OptionalTensor& b_enc,
                  const OptionalTensor& b_pre, bool relu) {
  check_device(x, {{"W_enc", W_enc}, {"b_enc", b_enc}, {"b_pre", b_pre}});
  const OnDevice device(x);
  const ScoreArguments in = encode_arguments(x, W_enc, b_enc, b_pre);
  Tensor z = new_tensor(x, {in.score.T, in.score.C}, ScalarType::Float);
  launch_sae_encode({in.score, data_of(in.bias), relu, z.mutable_data_ptr<float>()}, device.stream());
  return z;
}

std::tuple<Tensor, Tensor> sae_encode_topk(const Tensor& x, const Tensor& W_enc, const OptionalTensor& b_enc,
                                           const OptionalTensor& b_pre, int64_t k,
                                           const OptionalTensor& mask_table, const OptionalTensor& mask_row,
                                           bool relu, const OptionalTensor& scan_plane,
                                           const OptionalTensor& scan_terms,
                                           const OptionalTensor& scan_mean) {
  check_device(x, {{"W_enc", W_enc},
                   {"b_enc", b_enc},
                   {"b_pre", b_pre},
                   {"mask_table", mask_table},
                   {"mask_row", mask_row},
                   {"scan_plane", scan_plane},
                   {"scan_terms", scan_terms},
                   {"scan_mean", scan_mean}});
  const OnDevice device(x);
  const ScoreArguments in = encode_arguments(x, W_enc, b_enc, b_pre);
  const int64_t T = in.score.T, C = in.score.C;
  const ScanArguments scan(scan_plane, scan_terms, scan_mean, C, in.score.E);
  const MaskArguments mask(mask_table, mask_row, T, C, Values::on_device);
  SelectMemory memory(x, in.score, nullptr, data_of(in.bias), scan.plane(Values::on_device), mask.mask(), k,
                      /*rides_along=*/false);
  Tensor scores = new_tensor(x, {T, k}, ScalarType::Float), ids = new_tensor(x, {T, k}, ScalarType::Int);
  memory.job.p.relu = relu;
  memory.job.p.scores = scores.mutable_data_ptr<float>();
  memory.job.p.ids = ids.mutable_data_ptr<int32_t>();
  launch_codebook_quantize(memory.job, device.stream());
  return {scores, ids};
}

}  // namespace
}  // namespace cu_fast

CU_FAST_IMPLEMENTATION(CU_FAST_NAMESPACE, CU_FAST_GPU, m) {
  m.impl("sae_encode", TORCH_BOX(&cu_fast::sae_encode));
  m.impl("sae_encode_topk", TORCH_BOX(&cu_fast::sae_encode_topk));
}
