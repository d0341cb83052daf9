// sae_encode for AVX2; the algorithm: sae_encode-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_avx2.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX2)
namespace cu_fast::avx2 {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_words-inl.h"
#include "cpu/sae_encode-inl.h"
}  // namespace cu_fast::avx2
CU_FAST_TARGET_END
