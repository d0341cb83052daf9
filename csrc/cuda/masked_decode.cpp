// Host side of the decoder on a GPU. The kernel: masked_decode.cu.

#include "cuda/host.h"
#include "cuda/kernels.h"

namespace cu_fast {
namespace {

Tensor masked_decode(const Tensor& ids, const OptionalTensor& weights, const Tensor& table,
                     const OptionalTensor& bias, const OptionalTensor& residual,
                     const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool mean) {
  check_device(ids, {{"weights", weights},
                     {"table", table},
                     {"bias", bias},
                     {"residual", residual},
                     {"mask_table", mask_table},
                     {"mask_row", mask_row}});
  const OnDevice device(ids);
  const DecodeArguments in = decode_arguments(ids, weights, table, bias, residual, mean);
  const MaskArguments mask(mask_table, mask_row, in.p.T, in.p.C, Values::on_device);
  Tensor y = new_tensor(table, {in.p.T, in.p.D}, table.scalar_type());
  DecodeParams p = in.p;
  p.mask = mask.mask();
  p.y = y.mutable_data_ptr();
  launch_masked_decode(p, device.stream());
  return y;
}

}  // namespace
}  // namespace cu_fast

CU_FAST_IMPLEMENTATION(CU_FAST_NAMESPACE, CU_FAST_GPU, m) {
  m.impl("masked_decode", TORCH_BOX(&cu_fast::masked_decode));
}
