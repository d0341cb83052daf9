// delete_latents for any machine; the algorithm: delete_latents-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_scalar.h"

namespace cu_fast::scalar {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/fixed_words-inl.h"
#include "cpu/delete_latents-inl.h"
}  // namespace cu_fast::scalar
