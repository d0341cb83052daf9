// The operators as C++ functions, for the one that is made of the others. Arguments: csrc/ops.cpp.

#pragma once

#include <tuple>

#include "arguments.h"

namespace cu_fast {

std::tuple<Tensor, Tensor, Tensor> codebook_quantize(
    const Tensor& z, const Tensor& codes, const OptionalTensor& inv_norm, const OptionalTensor& bias,
    int64_t k, const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool return_hits,
    const OptionalTensor& scan_plane, const OptionalTensor& scan_terms, const OptionalTensor& scan_mean);

Tensor sae_encode(const Tensor& x, const Tensor& W_enc, const OptionalTensor& b_enc,
                  const OptionalTensor& b_pre, bool relu);

Tensor masked_decode(const Tensor& ids, const OptionalTensor& weights, const Tensor& table,
                     const OptionalTensor& bias, const OptionalTensor& residual,
                     const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool mean);

}  // namespace cu_fast
