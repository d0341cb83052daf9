// pack_digits for NEON; the algorithm: pack_digits-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_neon.h"

CU_FAST_TARGET_BEGIN(CU_FAST_NEON)
namespace cu_fast::neon {
#include "cpu/rows-inl.h"
#include "cpu/pack_digits-inl.h"
}  // namespace cu_fast::neon
CU_FAST_TARGET_END
