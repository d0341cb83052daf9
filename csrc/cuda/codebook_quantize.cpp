// Host side of the selection on a GPU: checks, memory. How it runs: select.h; the kernels:
// codebook_quantize.cu, scan_rows.cu, scan_codes.cu, score_candidates.cu.

#include <sstream>
#include <string>
#include <tuple>

#include "cuda/host.h"
#include "cuda/kernels.h"

namespace cu_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor> codebook_quantize(
    const Tensor& z, const Tensor& codes, const OptionalTensor& inv_norm, const OptionalTensor& bias,
    int64_t k, const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool return_hits,
    const OptionalTensor& scan_plane, const OptionalTensor& scan_terms, const OptionalTensor& scan_mean) {
  check_device(z, {{"codes", codes},
                   {"inv_norm", inv_norm},
                   {"bias", bias},
                   {"mask_table", mask_table},
                   {"mask_row", mask_row},
                   {"scan_plane", scan_plane},
                   {"scan_terms", scan_terms},
                   {"scan_mean", scan_mean}});
  const OnDevice device(z);
  const ScoreArguments in = quantize_arguments(z, codes, inv_norm, bias);
  const int64_t T = in.score.T, C = in.score.C;
  const ScanArguments scan(scan_plane, scan_terms, scan_mean, C, in.score.E);
  const MaskArguments mask(mask_table, mask_row, T, C, Values::on_device);
  SelectMemory memory(z, in.score, data_of(in.inv_norm), data_of(in.bias), scan.plane(Values::on_device),
                      mask.mask(), k, return_hits && mask_table.has_value());
  Tensor scores = new_tensor(z, {T, k}, ScalarType::Float), ids = new_tensor(z, {T, k}, ScalarType::Int);
  Tensor hits = new_tensor(z, {return_hits ? T : 0}, ScalarType::Int);
  memory.job.p.scores = scores.mutable_data_ptr<float>();
  memory.job.p.ids = ids.mutable_data_ptr<int32_t>();
  memory.job.p.hits = return_hits ? hits.mutable_data_ptr<int32_t>() : nullptr;
  launch_codebook_quantize(memory.job, device.stream());
  return {scores, ids, hits};
}

std::string cuda_selection_plan(int64_t T, int64_t C, int64_t E, int64_t k, int64_t code_bytes, bool scan,
                                int64_t multiprocessors) {
  const SelectPlan plan = plan_select(T, C, E, k, code_bytes, scan, multiprocessors);
  std::ostringstream text;
  if (plan.scans) {
    text << "int8 scan: " << plan.chunk << " tokens at a time, " << plan.sample_tiles << " of "
         << (C + kScanTile - 1) / kScanTile << " tiles of codes for the first threshold, " << plan.score_parts
         << " blocks a token for its candidates";
  } else {
    text << "every code scored: " << plan.parts << " x " << plan.part_codes << " codes";
  }
  return text.str();
}

}  // namespace
}  // namespace cu_fast

CU_FAST_IMPLEMENTATION(CU_FAST_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_selection_plan", TORCH_BOX(&cu_fast::cuda_selection_plan));
}

CU_FAST_IMPLEMENTATION(CU_FAST_NAMESPACE, CU_FAST_GPU, m) {
  m.impl("codebook_quantize", TORCH_BOX(&cu_fast::codebook_quantize));
}
