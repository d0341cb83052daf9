// Under which name operators are registered. The emulation of the CUDA kernels is a library of its own: the
// same operators under another name, for CPU tensors.

#pragma once

#include <torch/csrc/stable/library.h>

#ifdef CU_FAST_EMULATED
#define CU_FAST_NAMESPACE cu_fast_emulated
#define CU_FAST_GPU CPU
#else
#define CU_FAST_NAMESPACE cu_fast
#define CU_FAST_GPU CUDA
#endif

// One more step, so that the names above are replaced first.
#define CU_FAST_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define CU_FAST_IMPLEMENTATION(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
