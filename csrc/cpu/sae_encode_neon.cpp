// sae_encode for NEON; the algorithm: sae_encode-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_neon.h"

CU_FAST_TARGET_BEGIN(CU_FAST_NEON)
namespace cu_fast::neon {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_words-inl.h"
#include "cpu/sae_encode-inl.h"
}  // namespace cu_fast::neon
CU_FAST_TARGET_END
