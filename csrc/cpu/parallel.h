// Runs work on PyTorch's threads, in the floating-point mode that results need.

#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <cfenv>
#endif

#include <torch/csrc/stable/ops.h>

namespace cu_fast {

// Sets round to nearest and keeps denormals, whatever the process has set. The destructor restores the mode.
class FloatMode {
 public:
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

#if defined(__x86_64__)
  // That of SSE and AVX alone. fesetenv sets the x87 unit's too, which takes 5 % of a small call, and which nothing here
  // uses: only long double would.
  FloatMode() : saved_(_mm_getcsr()) { set(0x1f80); }  // every exception masked, none raised
  ~FloatMode() { set(saved_); }

 private:
  // No arithmetic may be moved across: what it reads and writes is memory.
  static void set(uint32_t mode) {
    asm volatile("" ::: "memory");
    _mm_setcsr(mode);
    asm volatile("" ::: "memory");
  }

  uint32_t saved_;
#else
  FloatMode() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatMode() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
#endif
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
