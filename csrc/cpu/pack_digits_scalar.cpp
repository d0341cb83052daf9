// pack_digits for any machine; the algorithm: pack_digits-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_scalar.h"

namespace cu_fast::scalar {
#include "cpu/rows-inl.h"
#include "cpu/pack_digits-inl.h"
}  // namespace cu_fast::scalar
