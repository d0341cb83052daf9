// How a selection would run on a device, in words for people.

#include <sstream>
#include <string>

#include "registration.h"

#ifndef CU_FAST_EMULATED
#include "cpu/scan.h"

namespace cu_fast {
namespace {

std::string selection_plan(int64_t T, int64_t C, int64_t E, int64_t k, int64_t threads, bool scan) {
  const auto [scans, grid] = plan_selection(T, C, E, k, threads, scan, /*largest_bias=*/0);
  std::ostringstream text;
  text << (scans ? "int8 scan" : "every code scored") << ": " << grid.token_blocks << " x "
       << grid.block_tokens << " tokens, " << grid.parts << " x " << grid.part_codes << " codes, "
       << grid.workers << " threads";
  return text.str();
}

}  // namespace
}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CompositeExplicitAutograd, m) {
  m.impl("selection_plan", TORCH_BOX(&cu_fast::selection_plan));
}
#endif

#if defined(CU_FAST_CUDA) || defined(CU_FAST_EMULATED)
#include "cuda/select.h"

namespace cu_fast {
namespace {

std::string cuda_selection_plan(int64_t T, int64_t C, int64_t E, int64_t k, bool scan,
                                int64_t multiprocessors) {
  const SelectPlan plan = plan_select(T, C, E, k, scan, multiprocessors);
  std::ostringstream text;
  if (plan.scans) {
    text << "int8 scan: " << plan.chunk << " tokens at a time, " << plan.sample_groups << " of "
         << scan_groups(C) << " groups of codes for the first threshold, " << plan.score_parts
         << " blocks per token for its candidates";
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
#endif
