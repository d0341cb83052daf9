// Under which name and for which devices operators are registered. The emulation of the CUDA kernels is a
// library of its own: the same operators under another name, for CPU tensors.

#pragma once

#include <torch/csrc/stable/library.h>

#ifdef CU_FAST_EMULATED
#define CU_FAST_NAMESPACE cu_fast_emulated
#else
#define CU_FAST_NAMESPACE cu_fast
#endif

// One more step, so that the name above is replaced first.
#define CU_FAST_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define CU_FAST_IMPLEMENTATION(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

#define CU_FAST_ADD_OPERATORS(key, Device)            \
  CU_FAST_IMPLEMENTATION(CU_FAST_NAMESPACE, key, m) { \
    add_operators<cu_fast::Device>(m);                \
  }
#if defined(CU_FAST_EMULATED)
#define CU_FAST_ADD_FOR_EACH_DEVICE CU_FAST_ADD_OPERATORS(CPU, Cuda)
#elif defined(CU_FAST_CUDA)
#define CU_FAST_ADD_FOR_EACH_DEVICE CU_FAST_ADD_OPERATORS(CPU, Cpu) CU_FAST_ADD_OPERATORS(CUDA, Cuda)
#else
#define CU_FAST_ADD_FOR_EACH_DEVICE CU_FAST_ADD_OPERATORS(CPU, Cpu)
#endif

// Begins the block that registers a file's operators for a Device; it runs for each device of this build.
#define CU_FAST_OPERATORS(Device, m)                                  \
  template <class Device>                                             \
  static void add_operators(torch::stable::detail::StableLibrary& m); \
  CU_FAST_ADD_FOR_EACH_DEVICE                                         \
  template <class Device>                                             \
  static void add_operators(torch::stable::detail::StableLibrary& m)
