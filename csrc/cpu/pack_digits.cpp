// Packs rows of weights on the CPU: a share of the rows for each thread. The kernel: pack_digits-inl.h.

#include <tuple>

#include "arguments.h"
#include "cpu/grid.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "registration.h"

namespace cu_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> pack_digits(const Tensor& codes_in) {
  const auto pack = CU_FAST_DISPATCH(pack_digits);
  check_shape("codes", codes_in, "[C, E]", {-1, -1});
  check_float("codes", codes_in);
  const int64_t C = codes_in.size(0), E = codes_in.size(1), width = digit_width(E);
  check(E <= kMostWidth, "codes are ", E, " wide, must be at most ", kMostWidth);
  const Tensor codes = with_contiguous_rows(codes_in);
  Tensor digits = on_huge_pages(new_tensor({C, kDigits, width}, ScalarType::Char));
  Tensor step = new_tensor({C}, ScalarType::Float), squares = new_tensor({C}, ScalarType::Float);
  const PackParams p = {matrix_of(codes),
                        C,
                        E,
                        digits.mutable_data_ptr<int8_t>(),
                        step.mutable_data_ptr<float>(),
                        squares.mutable_data_ptr<float>()};
  const int64_t workers = std::clamp<int64_t>(C * E / kMinWork, 1, torch::stable::get_num_threads());
  Tensor scratch = new_tensor({workers, width}, ScalarType::Float);
  float* const rows = scratch.mutable_data_ptr<float>();
  parallel(workers, C,
           [&](int64_t worker, int64_t begin, int64_t end) { pack(p, begin, end, rows + worker * width); });
  return {digits, step, squares};
}

}  // namespace
}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CPU, m) {
  m.impl("pack_digits", TORCH_BOX(&cu_fast::pack_digits));
}
