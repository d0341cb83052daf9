// Operators for tests of a selection: how it was cut, and what its scan left in memory.

#include <cstring>
#include <vector>

#include "host/devices.h"
#include "registration.h"

namespace cu_fast {
namespace {

std::vector<int64_t> select_plan(int64_t T, int64_t C, int64_t E, int64_t k, bool has_plane) {
  const SelectPlan plan = plan_select(T, C, E, k, has_plane, this_card());
  return {plan.scans,    plan.chunk,       plan.parts,         plan.part_codes,
          plan.capacity, plan.score_parts, plan.sample_groups, plan.rank};
}

// Scans one chunk and returns arrays of ScanWork: count, tau, id, lower, upper, scored, maxima, reached, terms (per row; the
// two of `start` are integers) and bytes.
std::vector<Tensor> scan_state(const Tensor& z, const Tensor& digits, const Tensor& factor,
                               const OptionalTensor& pre, const OptionalTensor& bias, int64_t k,
                               const OptionalTensor& mask_table, const OptionalTensor& mask_row,
                               bool counts_hits, const OptionalTensor& scan_plane,
                               const OptionalTensor& scan_terms, const OptionalTensor& scan_mean) {
  const ScoreArguments in = score_arguments(kQuantizeNames, z, digits, factor, pre, bias);
  const SelectArguments selected(in, {scan_plane, scan_terms, scan_mean}, k, {mask_table, mask_row},
                                 Cuda::kValues);
  const SelectMemory memory(z, selected.p, counts_hits);
  const int64_t T = in.score.T, E = in.score.E;
  const SelectPlan& plan = memory.job.plan;
  check(plan.scans && T > 0 && T <= plan.chunk, "this is not one chunk of a scan");
  launch_scan(memory.job, Stream{});
  std::vector<Tensor> state;
  const auto add_array = [&](const auto* from, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    Tensor t = new_tensor(z, sizes, dtype);
    std::memcpy(t.mutable_data_ptr(), from, static_cast<std::size_t>(t.numel()) * 4);
    state.push_back(t);
  };
  const ScanWork& work = memory.job.work;
  const int64_t steps = (E + 31) / 32, places = plan.candidates;
  const ScalarType floats = ScalarType::Float, ints = ScalarType::Int;
  add_array(work.count, {T}, ints);
  add_array(work.tau, {T}, floats);
  add_array(work.id, {T, places}, ints);
  add_array(work.lower, {T, places}, floats);
  add_array(work.upper, {T, places}, floats);
  add_array(work.scored, {T, places}, floats);
  add_array(work.maxima, {T, plan.sample_groups, kMaximaOfGroup}, floats);
  add_array(work.reached, {T}, floats);
  add_array(work.terms, {T, sizeof(RowTerms) / 4}, floats);
  add_array(work.bytes, {(T + 3) / 4, steps, 2, 32}, ints);
  return state;
}

}  // namespace
}  // namespace cu_fast

STABLE_TORCH_LIBRARY_FRAGMENT(cu_fast_emulated, m) {
  m.def("select_plan(int T, int C, int E, int k, bool has_plane) -> int[]");
  m.def(
      "scan_state(Tensor z, Tensor digits, Tensor factor, Tensor? pre, Tensor? bias, int k, "
      "Tensor? mask_table, Tensor? mask_row, bool counts_hits, "
      "Tensor? scan_plane, Tensor? scan_terms, Tensor? scan_mean) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(cu_fast_emulated, CompositeExplicitAutograd, m) {
  m.impl("select_plan", TORCH_BOX(&cu_fast::select_plan));
  m.impl("scan_state", TORCH_BOX(&cu_fast::scan_state));
}
