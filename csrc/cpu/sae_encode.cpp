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
Tensor sae_encode(const Tensor& x, const Tensor& W_enc, const OptionalTensor& b_enc,
                  const OptionalTensor& b_pre, bool relu) {
  const ScoreArguments in = encode_arguments(x, W_enc, b_enc, b_pre);
  Tensor z = new_tensor({in.score.T, in.score.C}, ScalarType::Float);
  const auto encode = CU_FAST_DISPATCH(sae_encode);
  if (z.numel() == 0) return z;

  const Grid grid = plan_grid(in.score.T, in.score.C, in.score.E, torch::stable::get_num_threads());
  const int64_t floats = round_up(scratch_floats(in.score), kLanes);
  Tensor scratch = new_tensor({grid.workers, floats}, ScalarType::Float);
  const EncodeParams p{in.score, data_of(in.bias), relu, z.mutable_data_ptr<float>()};
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
  const ScoreArguments in = encode_arguments(x, W_enc, b_enc, b_pre);
  const ScanArguments scan(scan_plane, scan_terms, scan_mean, in.score.C, in.score.E);
  SelectResult result = select(in.score, /*inv_norm=*/nullptr, data_of(in.bias), scan.plane(), k, mask_table,
                               mask_row, /*return_hits=*/false, relu);
  return {result.scores, result.ids};
}

}  // namespace
}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CPU, m) {
  m.impl("sae_encode", TORCH_BOX(&cu_fast::sae_encode));
  m.impl("sae_encode_topk", TORCH_BOX(&cu_fast::sae_encode_topk));
}
