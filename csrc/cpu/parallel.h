// Runs work on PyTorch's threads, in the floating-point mode that results need.

#pragma once

#include <cfenv>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace cu_fast {

// Sets round to nearest and keeps denormals, whatever the process has set. The destructor restores the mode.
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

// Calls work(worker, begin, end) once per worker, with its share of `items`. work must not throw.
template <class Work>
void parallel(int64_t workers, int64_t items, const Work& work) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    const FloatMode mode;
    for (int64_t w = first; w < last; ++w) work(w, items * w / workers, items * (w + 1) / workers);
  });
}

}  // namespace cu_fast
