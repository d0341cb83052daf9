// CU_FAST_BOTH marks functions that both host code and CUDA kernels call.

#pragma once

#ifdef __CUDACC__
#define CU_FAST_BOTH __host__ __device__
#else
#define CU_FAST_BOTH
#endif
