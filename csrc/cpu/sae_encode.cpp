// Host side of the encoder: dense (kernel: sae_encode-inl.h), and with k, which is a selection whose codes
// are the rows of W_enc (kernel: codebook_quantize-inl.h).

#include <tuple>

#include "cpu/grid.h"
#include "cpu/kernels.h"
#include "cpu/operators.h"
#include "cpu/parallel.h"
#include "cpu/select.h"
#include "cpu/simd.h"

#include <torch/csrc/stable/library.h>

namespace cu_fast {
namespace {

// The arguments that both forms share, checked, and kept alive for the pointers in `score`.
struct Operands {
  Tensor x, W_enc;
  OptionalTensor b_enc, b_pre;
  ScoreParams score;
};

Operands operands(const Tensor& x_in, const Tensor& W_enc_in, const OptionalTensor& b_enc_in,
                  const OptionalTensor& b_pre_in) {
  check_shape("x", x_in, "[T, D]", {-1, -1});
  check_float("x", x_in);
  const int64_t T = x_in.size(0), D = x_in.size(1);
  check_shape("W_enc", W_enc_in, "[E, D]", {-1, D});
  check_float("W_enc", W_enc_in);
  const int64_t E = W_enc_in.size(0);
  const OptionalTensor b_enc = as_fp32("b_enc", b_enc_in, "[E]", {E});
  const OptionalTensor b_pre = as_fp32("b_pre", b_pre_in, "[D]", {D});
  const Tensor x = with_contiguous_rows(x_in), W_enc = with_contiguous_rows(W_enc_in);
  return {x, W_enc, b_enc, b_pre, {matrix_of(x), matrix_of(W_enc), data_of(b_pre), T, E, D}};
}

}  // namespace

Tensor sae_encode(const Tensor& x, const Tensor& W_enc, const OptionalTensor& b_enc,
                  const OptionalTensor& b_pre, bool relu) {
  const Operands in = operands(x, W_enc, b_enc, b_pre);
  Tensor z = new_tensor({in.score.T, in.score.C}, ScalarType::Float);
  const auto encode = CU_FAST_DISPATCH(sae_encode);
  if (z.numel() == 0) return z;

  const Grid grid = plan_grid(in.score.T, in.score.C, in.score.E, torch::stable::get_num_threads());
  const int64_t floats = round_up(scratch_floats(in.score), kLanes);
  Tensor scratch = new_tensor({grid.workers, floats}, ScalarType::Float);
  const EncodeParams p{in.score, data_of(in.b_enc), relu, z.mutable_data_ptr<float>()};
  float* const scratch_data = scratch.mutable_data_ptr<float>();
  parallel(grid.workers, grid.size(), [&](int64_t worker, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) encode(p, grid.block(i), scratch_data + worker * floats);
  });
  return z;
}

namespace {

std::tuple<Tensor, Tensor> sae_encode_topk(const Tensor& x, const Tensor& W_enc, const OptionalTensor& b_enc,
                                           const OptionalTensor& b_pre, int64_t k,
                                           const OptionalTensor& mask_table, const OptionalTensor& mask_row,
                                           bool relu, const OptionalTensor& scan_plane,
                                           const OptionalTensor& scan_terms,
                                           const OptionalTensor& scan_mean) {
  const Operands in = operands(x, W_enc, b_enc, b_pre);
  const ScanArguments scan(scan_plane, scan_terms, scan_mean, in.score.C, in.score.E);
  SelectResult result = select(in.score, /*inv_norm=*/nullptr, data_of(in.b_enc), scan.plane(), k, mask_table,
                               mask_row, /*return_hits=*/false, relu);
  return {result.scores, result.ids};
}

}  // namespace
}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CPU, m) {
  m.impl("sae_encode", TORCH_BOX(&cu_fast::sae_encode));
  m.impl("sae_encode_topk", TORCH_BOX(&cu_fast::sae_encode_topk));
}
