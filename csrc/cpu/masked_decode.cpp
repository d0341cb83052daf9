// Decoding on the CPU: a share of the tokens for each thread. The kernel: masked_decode-inl.h.

#include <algorithm>

#include "cpu/grid.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "host/cpu.h"

namespace cu_fast {

void Cpu::decode(const DecodeParams& p) const {
  const auto decode = CU_FAST_DISPATCH(masked_decode);
  if (p.T == 0 || p.D == 0) return;

  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min({threads, p.T, 1 + p.T * p.k * p.D / kMinWork});
  Tensor scratch = empty({workers, p.k * static_cast<int64_t>(sizeof(DecodeSlot))}, ScalarType::Byte);
  auto* const slots = static_cast<DecodeSlot*>(scratch.mutable_data_ptr());
  parallel(workers, p.T,
           [&](int64_t worker, int64_t begin, int64_t end) { decode(p, begin, end, slots + worker * p.k); });
}

}  // namespace cu_fast
