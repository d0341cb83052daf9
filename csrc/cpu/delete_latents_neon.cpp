// delete_latents for NEON; the algorithm: delete_latents-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_neon.h"

CU_FAST_TARGET_BEGIN(CU_FAST_NEON)
namespace cu_fast::neon {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_words-inl.h"
#include "cpu/delete_latents-inl.h"
}  // namespace cu_fast::neon
CU_FAST_TARGET_END
