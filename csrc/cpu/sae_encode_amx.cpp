// sae_encode for AMX; the algorithm: sae_encode-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_amx.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX512)
namespace cu_fast::amx {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_tiles-inl.h"
#include "cpu/sae_encode-inl.h"
}  // namespace cu_fast::amx
CU_FAST_TARGET_END
