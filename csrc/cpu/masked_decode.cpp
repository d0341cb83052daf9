// Host side: checks, and a share of the tokens for each thread. The kernel: masked_decode-inl.h.

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "cpu/grid.h"
#include "cpu/kernels.h"
#include "cpu/operators.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>

namespace cu_fast {

Tensor masked_decode(const Tensor& ids, const OptionalTensor& weights, const Tensor& table,
                     const OptionalTensor& bias, const OptionalTensor& residual,
                     const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool mean) {
  const DecodeArguments in = decode_arguments(ids, weights, table, bias, residual, mean);
  DecodeParams p = in.p;
  const std::vector<int32_t> checked_ids = checked_copy("ids", p.ids, p.T, p.k, -1, p.C);
  p.ids = checked_ids.data();
  const MaskArguments mask(mask_table, mask_row, p.T, p.C);
  p.mask = mask.mask();

  Tensor y = new_tensor({p.T, p.D}, in.table.scalar_type());
  const auto decode = CU_FAST_DISPATCH(masked_decode);
  if (y.numel() == 0) return y;
  p.y = y.mutable_data_ptr();

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min({threads, p.T, 1 + p.T * p.k * p.D / kMinWork});
  Tensor scratch = new_tensor({workers, p.k * static_cast<int64_t>(sizeof(DecodeSlot))}, ScalarType::Byte);
  auto* const slots = static_cast<DecodeSlot*>(scratch.mutable_data_ptr());
  parallel(workers, p.T,
           [&](int64_t worker, int64_t begin, int64_t end) { decode(p, begin, end, slots + worker * p.k); });
  return y;
}

}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CPU, m) {
  m.impl("masked_decode", TORCH_BOX(&cu_fast::masked_decode));
}
