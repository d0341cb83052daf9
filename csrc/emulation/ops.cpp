// Operators with which tests control the emulation, beside the library's own (csrc/ops.cpp).

#include <cstdint>
#include <string>

#include <torch/csrc/stable/library.h>

#include "emulation/launch.h"

namespace {

void set_seed(int64_t seed) {
  cu_fast::set_emulation_seed(static_cast<uint64_t>(seed));
}

void set_multiprocessors(int64_t count) {
  cu_fast::set_emulated_multiprocessors(static_cast<int>(count));
}

void set_wgmma(bool chosen) {
  cu_fast::set_emulated_hopper(chosen);
}

std::string launched() {
  return cu_fast::launched_kernels();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cu_fast_emulated, m) {
  m.def("set_seed(int seed) -> ()");
  m.def("launched() -> str");
  m.def("set_multiprocessors(int count) -> ()");
  m.def("set_wgmma(bool chosen) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cu_fast_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_seed", TORCH_BOX(&set_seed));
  m.impl("launched", TORCH_BOX(&launched));
  m.impl("set_multiprocessors", TORCH_BOX(&set_multiprocessors));
  m.impl("set_wgmma", TORCH_BOX(&set_wgmma));
}
