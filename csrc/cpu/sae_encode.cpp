// Encoding on the CPU: blocks of tokens and rows of W_enc. The kernel: sae_encode-inl.h.

#include "cpu/grid.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "host/cpu.h"

namespace cu_fast {

void Cpu::encode(const EncodeParams& p) const {
  const auto encode = CU_FAST_DISPATCH_TILES(sae_encode);
  const ScoreParams& score = p.score;
  if (score.T == 0 || score.C == 0) return;

  const Grid grid = plan_grid(score.T, score.C, score.E, torch::stable::get_num_threads());
  const int64_t floats = round_up(scratch_floats(score), kLanes);
  Tensor scratch = empty({grid.workers, floats}, ScalarType::Float);
  float* const scratch_data = scratch.mutable_data_ptr<float>();
  parallel(grid.workers, grid.size(), [&](int64_t worker, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) encode(p, grid.block(i), scratch_data + worker * floats);
  });
}

}  // namespace cu_fast
