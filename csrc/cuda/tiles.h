// Which tile of exact scores a launch takes.

#pragma once

#include "cuda/fixed.h"
#include "cuda/fixed_sm90.h"
#include "cuda/kernels.h"

namespace cu_fast {

// Calls run(tile) with the tile type that has so many tokens (tile_tokens, cuda/select.h).
template <class Run>
void with_tile(int64_t tokens, const Run& run) {
  if (tokens == 1) {
    run(QuadTile<1>());
  } else if (tokens == 4) {
    run(QuadTile<4>());
  } else if (tokens == 16) {
    run(TensorTile<16, 1, 1, 3>());
  } else if (has_hopper()) {
    run(WarpgroupTile());
  } else {
    run(TensorTile<128, 2, 4, 2>());
  }
}

}  // namespace cu_fast
