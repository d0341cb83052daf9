// For functions that kernels on a GPU call too.

#pragma once

#ifdef __CUDACC__
#define CU_FAST_BOTH __host__ __device__
#else
#define CU_FAST_BOTH
#endif
