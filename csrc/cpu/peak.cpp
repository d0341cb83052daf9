// Host side of the peak rates; kernels: peak-inl.h.

#include <atomic>
#include <string>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "registration.h"

namespace cu_fast {
namespace {

// The work of all threads: operations (two per multiply-add), or bytes.
template <class Work>
int64_t on_all_threads(int64_t items, const Work& work) {
  std::atomic<int64_t> done = 0;
  std::atomic<int32_t> seen = 0;
  parallel(torch::stable::get_num_threads(), items, [&](int64_t, int64_t begin, int64_t end) {
    int32_t value = 0;
    done += work(begin, end, &value);
    seen ^= value;
  });
  return done;
}

int64_t peak(std::string kind, int64_t iterations) {
  check(kind == "int8" || kind == "fp32", "kind is '", kind, "', must be int8 or fp32");
  const auto run = kind == "int8" ? CU_FAST_DISPATCH_TILES(peak_int8) : CU_FAST_DISPATCH(peak_fp32);
  return on_all_threads(torch::stable::get_num_threads(),
                        [&](int64_t, int64_t, int32_t* out) { return run(iterations, out); });
}

int64_t peak_read(const Tensor& buffer) {
  check_dtype("buffer", buffer, ScalarType::Int);
  check_shape("buffer", buffer, "[n]", {-1});
  const auto run = CU_FAST_DISPATCH(peak_read);
  const int32_t* const data = buffer.const_data_ptr<int32_t>();
  return on_all_threads(buffer.numel(), [&](int64_t begin, int64_t end, int32_t* out) {
    return run(data + begin, end - begin, out);
  });
}

}  // namespace
}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CompositeExplicitAutograd, m) {
  m.impl("peak", TORCH_BOX(&cu_fast::peak));
  m.impl("peak_read", TORCH_BOX(&cu_fast::peak_read));
}
