// The encoder: every entry of z is a canonical dot product, so no selection from it depends on the batch.
//
//   z[t, e] = act(canonical(x_t - b_pre, W_enc_e) + b_enc_e)      a row of x - b_pre with NaN or Inf: NaN
//
//   what          shape                layout
//   x             [T, D], any stride   fp32, bf16 or fp16
//   W_enc         [E, D], any stride   the same
//   b_enc, b_pre  [E], [D] fp32        null: zero
//   z             [T, E] fp32          contiguous
//
// One tile of tokens and codes per block (cuda/canonical.h), then the epilogue.

#include "cuda/canonical.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace cu_fast {
namespace {

template <class Tile>
CU_FAST_KERNEL(kThreads, 2)
sae_encode_tile(EncodeParams p) {
  struct Shared {
    typename Tile::Shared tile;
    uint32_t faulty;
  };
  start_kernel();
  Shared& shared = shared_memory<Shared>();
  if (thread_index() == 0) shared.faulty = 0;
  const int64_t t0 = int64_t{block_index_y()} * Tile::kTokens, c0 = int64_t{block_index_x()} * Tile::kCodes;
  float dots[Tile::kM][Tile::kN];
  Tile::dots(p.score, t0, c0, shared.tile, &shared.faulty, dots);
  sync_block();  // faulty is visible to all threads, also if rows have no entries
  each_pair<Tile>(dots, [&](int token, int code, float dot) {
    const int64_t t = t0 + token, j = c0 + code;
    if (t >= p.score.T || j >= p.score.C) return;
    float z = p.bias == nullptr ? dot : add(dot, p.bias[j]);
    if (p.relu && z <= 0) z = 0;
    if (shared.faulty >> token & 1) z = quiet_nan();
    p.out[t * p.score.C + j] = z;
  });
}

template <class Tile>
void launch_tiles(const EncodeParams& p, Stream stream) {
  // gridDim.y <= 65535: more tokens take further launches.
  constexpr int64_t kMost = int64_t{Tile::kTokens} * 65535;
  for (int64_t t = 0; t < p.score.T; t += kMost) {
    EncodeParams some = p;
    some.score.z = p.score.z.from_row(t);
    some.score.T = p.score.T - t < kMost ? p.score.T - t : kMost;
    some.out = p.out + t * p.score.C;
    const Grid2 grid{(p.score.C + Tile::kCodes - 1) / Tile::kCodes,
                     (some.score.T + Tile::kTokens - 1) / Tile::kTokens};
    launch(sae_encode_tile<Tile>, grid, kThreads, stream, some);
  }
}

}  // namespace

void launch_sae_encode(const EncodeParams& p, Stream stream) {
  if (p.score.T == 0 || p.score.C == 0) return;
  with_tile(p.score.T, [&]<class Tile>(Tile) { launch_tiles<Tile>(p, stream); });
}

}  // namespace cu_fast
