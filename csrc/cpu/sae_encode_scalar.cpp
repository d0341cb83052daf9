// sae_encode for any machine; the algorithm: sae_encode-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_scalar.h"

namespace cu_fast::scalar {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_words-inl.h"
#include "cpu/sae_encode-inl.h"
}  // namespace cu_fast::scalar
