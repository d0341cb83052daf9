// peak for any machine; the algorithm: peak-inl.h.

#include "cpu/baseline.h"
#include "cpu/vec_scalar.h"

namespace cu_fast::scalar {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/scan-inl.h"
#include "cpu/peak-inl.h"
}  // namespace cu_fast::scalar
