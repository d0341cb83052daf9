// Instruction sets: which one runs, and how its code is kept apart from the rest.
//
// The algorithm of an operator is written once, in <op>-inl.h, over the type Vec. <op>_<level>.cpp includes
// it into the namespace and the target region of one level. Every other header comes before the region opens:
// what is compiled inside it may use instructions that the machine lacks, and a linker that keeps one copy of
// an inline function must never find such a copy. So no file needs a compiler flag for its instruction set.

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

// Keep in step with is_supported() in simd.cpp.
#define CU_FAST_AVX2 "avx2,f16c"
#define CU_FAST_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"

namespace cu_fast {

enum class SimdLevel { scalar, avx2, avx512 };

// The best level of this machine, or the one that the environment variable CU_FAST_SIMD named when the
// library was loaded. Throws if that is no level, or one that this machine or this build lacks.
SimdLevel simd_level();

}  // namespace cu_fast

// The function of that name for the level that runs.
#if defined(__x86_64__)
#define CU_FAST_DISPATCH(function)                               \
  (simd_level() == SimdLevel::avx512 ? cu_fast::avx512::function \
   : simd_level() == SimdLevel::avx2 ? cu_fast::avx2::function   \
                                     : cu_fast::scalar::function)
#else
#define CU_FAST_DISPATCH(function) (simd_level(), cu_fast::scalar::function)
#endif
