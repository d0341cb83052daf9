// How a selection would run on a device, in words for people.

#include <iomanip>
#include <sstream>
#include <string>

#include "check.h"
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

// A plan is a pure function, so it is there without CUDA too, for any card.
#include "cuda/select.h"

namespace cu_fast {
namespace {

std::string cuda_selection_plan(int64_t T, int64_t C, int64_t E, int64_t k, bool scan,
                                int64_t multiprocessors, int64_t major, int64_t minor) {
  check(C > 0 && k > 0 && k <= C && multiprocessors > 0,
        "a plan is for 1 <= k <= C on a multiprocessor or more");
  const Card card = {multiprocessors, major, minor};
  const SelectPlan plan = plan_select(T, C, E, k, scan, card);
  std::ostringstream text;
  if (plan.scans) {
    text << "int8 scan: " << plan.chunk << " tokens at a time, " << plan.sample_groups << " of "
         << scan_groups(C) << " groups of codes for the first threshold, " << plan.score_parts
         << " blocks per token for its candidates";
  } else {
    text << "every code scored: " << plan.chunk << " tokens at a time, " << plan.parts << " x "
         << plan.part_codes << " codes";
  }
  text << "; " << memory_of(plan, E, k) << " bytes of memory";
  if (may_scan(C, k, scan)) {
    const SelectPrediction predicted = predict_select(T, C, E, k, plan, card);
    text << std::fixed << std::setprecision(1) << "; predicted: " << predicted.candidates
         << " candidates per token for " << plan.candidates << " places, " << predicted.scored
         << " of them scored, " << predicted.scan << " us scanned, " << predicted.exact
         << " us with every code scored";
  }
  return text.str();
}

}  // namespace
}  // namespace cu_fast

CU_FAST_IMPLEMENTATION(CU_FAST_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_selection_plan", TORCH_BOX(&cu_fast::cuda_selection_plan));
}
