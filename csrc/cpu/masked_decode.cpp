// Host side: checks, and a share of the tokens for each thread. The kernel: masked_decode-inl.h.

#include <algorithm>

#include "cpu/arguments.h"
#include "cpu/grid.h"
#include "cpu/kernels.h"
#include "cpu/operators.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>

namespace cu_fast {

Tensor masked_decode(const Tensor& ids_in, const OptionalTensor& weights_in, const Tensor& table_in,
                     const OptionalTensor& bias_in, const OptionalTensor& residual_in,
                     const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool mean) {
  check_shape("ids", ids_in, "[T, k]", {-1, -1});
  check_dtype("ids", ids_in, ScalarType::Int);
  check_shape("table", table_in, "[C, D]", {-1, -1});
  check_float("table", table_in);
  const int64_t T = ids_in.size(0), k = ids_in.size(1), C = table_in.size(0), D = table_in.size(1);
  check(k >= 1, "ids must have at least one column, got ", describe(ids_in));
  const Tensor ids = torch::stable::contiguous(ids_in), table = with_contiguous_rows(table_in);
  check_range("ids", ids.const_data_ptr<int32_t>(), T, k, -1, C);
  const OptionalTensor weights = as_fp32("weights", weights_in, "[T, k]", {T, k});
  const OptionalTensor bias = as_fp32("bias", bias_in, "[D]", {D});
  OptionalTensor residual;
  if (residual_in) {
    check_shape("residual", *residual_in, "[T, D]", {T, D});
    check_float("residual", *residual_in);
    residual = with_contiguous_rows(*residual_in);
  }
  const MaskArguments mask(mask_table, mask_row, T, C);

  Tensor y = new_tensor({T, D}, table.scalar_type());
  const auto decode = CU_FAST_DISPATCH(masked_decode);
  if (y.numel() == 0) return y;

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min({threads, T, 1 + T * k * D / kMinWork});
  Tensor scratch = new_tensor({workers, k * static_cast<int64_t>(sizeof(DecodeSlot))}, ScalarType::Byte);
  const DecodeParams p{ids.const_data_ptr<int32_t>(),
                       data_of(weights),
                       matrix_of(table),
                       data_of(bias),
                       residual ? matrix_of(*residual) : Matrix{nullptr, 0, Dtype::f32},
                       mask.mask(),
                       mean,
                       T,
                       D,
                       k,
                       y.mutable_data_ptr()};
  auto* const slots = static_cast<DecodeSlot*>(scratch.mutable_data_ptr());
  parallel(workers, T,
           [&](int64_t worker, int64_t begin, int64_t end) { decode(p, begin, end, slots + worker * k); });
  return y;
}

}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CPU, m) {
  m.impl("masked_decode", TORCH_BOX(&cu_fast::masked_decode));
}
