// delete_latents for AVX-512; the algorithm: delete_latents-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_avx512.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX512)
namespace cu_fast::avx512 {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_words-inl.h"
#include "cpu/delete_latents-inl.h"
}  // namespace cu_fast::avx512
CU_FAST_TARGET_END
