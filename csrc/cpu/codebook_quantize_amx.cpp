// codebook_quantize for AMX; the algorithm: codebook_quantize-inl.h and codebook_quantize_scan-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_amx.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX512)
namespace cu_fast::amx {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_tiles-inl.h"
#include "cpu/codebook_quantize-inl.h"
#include "cpu/scan-inl.h"
#include "cpu/scan_tiles-inl.h"
using Products = TileProducts;
#include "cpu/codebook_quantize_scan-inl.h"
}  // namespace cu_fast::amx
CU_FAST_TARGET_END
