// The dense encoder: every row of z - pre against every row of weights.
//
//   z[t][e] = act(score(x_t - b_pre, W_enc_e) + b_enc_e)      a row of x - b_pre with NaN or Inf: NaN
//
//   what       shape                layout
//   x          [T, D], any stride   fp32, bf16 or fp16
//   W_digits   [E, 3, W] int8       contiguous
//   z          [T, E] fp32          contiguous
//
// fix_rows, then one tile of tokens and codes per block (cuda/tiles.h).

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/tiles.h"

namespace cu_fast {
namespace {

template <class Tile>
CU_FAST_KERNEL(kThreads, Tile::kBlocks)
sae_encode_tile(EncodeParams p, FixedRows rows) {
  start_kernel();
  const int64_t t0 = int64_t{block_index_y()} * Tile::kTokens, c0 = int64_t{block_index_x()} * kTileCodes;
  typename Tile::Sums sums;
  Tile::multiply(p.score, rows, t0, c0, shared_memory<typename Tile::Shared>(), sums);
  const float* const unit = rows.unit + t0;
  float* const out = p.out + t0 * p.score.C + c0;
  Tile::each(sums, p.score, t0, c0, kAllRounds, [&](int token, int code, CodeTerms terms, int64_t total) {
    float z = round_score(total, unit[token], terms);
    if (p.relu && z <= 0) z = 0;
    out[token * p.score.C + code] = z;
  });
}

}  // namespace

void launch_sae_encode(const EncodeParams& p, const FixedRows& rows, Stream stream) {
  if (p.score.C == 0) return;
  const int64_t at_once = rows_at_once(p.score.T, p.score.E);
  for (int64_t t = 0; t < p.score.T; t += at_once) {
    EncodeParams some = p;
    some.score.z = p.score.z.from_row(t);
    some.score.T = std::min(p.score.T - t, at_once);
    some.out = p.out + t * p.score.C;
    launch_fix_rows(some.score, rows, stream);
    with_tile(tile_tokens(p.score.T, p.score.E), [&]<class Tile>(Tile) {
      const Grid2 grid{(p.score.C + kTileCodes - 1) / kTileCodes,
                       (some.score.T + Tile::kTokens - 1) / Tile::kTokens};
      launch(sae_encode_tile<Tile>, grid, {kThreads, Tile::kDynamicShared}, stream, some, rows);
    });
  }
}

}  // namespace cu_fast
