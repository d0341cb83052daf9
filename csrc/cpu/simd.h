// Instruction sets: which one runs, and how its code is kept apart from the rest.
//
// The algorithm of an operator is written once, in <op>-inl.h, over the type Vec. <op>_<level>.cpp includes
// it into the namespace and the target region of one level. Every other header is included before the region
// opens: functions compiled inside it may use instructions that the CPU lacks, and the linker, which keeps
// one copy of an inline function, might keep theirs. No file needs a compiler flag for its instruction set.

#pragma once

#define CU_FAST_PRAGMA(directive) _Pragma(#directive)
#if defined(__clang__)
#define CU_FAST_TARGET_BEGIN(features) \
  CU_FAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define CU_FAST_TARGET_END CU_FAST_PRAGMA(clang attribute pop)
#else
#define CU_FAST_TARGET_BEGIN(features) CU_FAST_PRAGMA(GCC push_options) CU_FAST_PRAGMA(GCC target(features))
#define CU_FAST_TARGET_END CU_FAST_PRAGMA(GCC pop_options)
#endif

// Must match is_supported() in simd.cpp.
#define CU_FAST_AVX2 "avx2,f16c"
#define CU_FAST_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define CU_FAST_NEON "arch=armv8.2-a+dotprod"

namespace cu_fast {

// amx: avx512, and matrix tiles where there is a kernel for them.
enum class SimdLevel { scalar, avx2, avx512, amx, neon };

// The best level of this machine, or the one that the environment variable CU_FAST_SIMD named when the
// library was loaded. Throws if there is no such level, or if this machine or this build lacks it.
SimdLevel simd_level();

}  // namespace cu_fast

// The function of this name at the level in use. Those that have tiles too are chosen by CU_FAST_DISPATCH_TILES.
#if defined(__x86_64__)
#define CU_FAST_DISPATCH(function)                               \
  (simd_level() >= SimdLevel::avx512 ? cu_fast::avx512::function \
   : simd_level() == SimdLevel::avx2 ? cu_fast::avx2::function   \
                                     : cu_fast::scalar::function)
#define CU_FAST_DISPATCH_TILES(function) \
  (simd_level() == SimdLevel::amx ? cu_fast::amx::function : CU_FAST_DISPATCH(function))
#elif defined(__aarch64__) && defined(__linux__)
#define CU_FAST_DISPATCH(function) \
  (simd_level() == SimdLevel::neon ? cu_fast::neon::function : cu_fast::scalar::function)
#define CU_FAST_DISPATCH_TILES(function) CU_FAST_DISPATCH(function)
#else
#define CU_FAST_DISPATCH(function) (simd_level(), cu_fast::scalar::function)
#define CU_FAST_DISPATCH_TILES(function) CU_FAST_DISPATCH(function)
#endif
