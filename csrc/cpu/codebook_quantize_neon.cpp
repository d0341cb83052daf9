// codebook_quantize for NEON; the algorithm: codebook_quantize-inl.h and codebook_quantize_scan-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_neon.h"

CU_FAST_TARGET_BEGIN(CU_FAST_NEON)
namespace cu_fast::neon {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_words-inl.h"
#include "cpu/codebook_quantize-inl.h"
#include "cpu/scan-inl.h"
using Products = RowProducts;
#include "cpu/codebook_quantize_scan-inl.h"
}  // namespace cu_fast::neon
CU_FAST_TARGET_END
