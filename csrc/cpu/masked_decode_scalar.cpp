// masked_decode for any machine; the algorithm: masked_decode-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_scalar.h"

namespace cu_fast::scalar {
#include "cpu/rows-inl.h"
#include "cpu/masked_decode-inl.h"
}  // namespace cu_fast::scalar
