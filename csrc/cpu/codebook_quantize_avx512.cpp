// codebook_quantize for AVX-512; the algorithm: codebook_quantize-inl.h and codebook_quantize_scan-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_avx512.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX512)
namespace cu_fast::avx512 {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_words-inl.h"
#include "cpu/codebook_quantize-inl.h"
#include "cpu/scan-inl.h"
using Products = RowProducts;
#include "cpu/codebook_quantize_scan-inl.h"
}  // namespace cu_fast::avx512
CU_FAST_TARGET_END
