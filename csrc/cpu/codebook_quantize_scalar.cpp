// codebook_quantize for any machine; the algorithm: codebook_quantize-inl.h and codebook_quantize_scan-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_scalar.h"

namespace cu_fast::scalar {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_words-inl.h"
#include "cpu/codebook_quantize-inl.h"
#include "cpu/scan-inl.h"
using Products = RowProducts;
#include "cpu/codebook_quantize_scan-inl.h"
}  // namespace cu_fast::scalar
