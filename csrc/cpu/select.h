// Host side of a selection, shared by codebook_quantize and the TopK form of sae_encode.

#pragma once

#include "check.h"
#include "core/params.h"
#include "arguments.h"

namespace cu_fast {

struct SelectResult {
  Tensor scores, ids, hits;
};

// Everything is checked but k and the mask. `score` gives the operands, inv_norm and bias ([C], or null) the
// epilogue, `scan` the plane of both, or nothing.
SelectResult select(const ScoreParams& score, const float* inv_norm, const float* bias, const ScanPlane& scan,
                    int64_t k, const OptionalTensor& mask_table, const OptionalTensor& mask_row,
                    bool return_hits, bool relu);

}  // namespace cu_fast
