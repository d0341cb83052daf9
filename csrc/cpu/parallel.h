// Threads of the framework, each with the floating-point mode that the canonical score asks for.

#pragma once

#include <cfenv>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace cu_fast {

// Round to nearest, denormals kept, whatever the process has set; what was set comes back at the end.
class FloatMode {
 public:
  FloatMode() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatMode() { std::fesetenv(&saved_); }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  std::fenv_t saved_;
};

// Calls work(worker, begin, end) once for each worker, with its share of `items`. No exception may leave it.
template <class Work>
void parallel(int64_t workers, int64_t items, const Work& work) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    const FloatMode mode;
    for (int64_t w = first; w < last; ++w) work(w, items * w / workers, items * (w + 1) / workers);
  });
}

}  // namespace cu_fast
