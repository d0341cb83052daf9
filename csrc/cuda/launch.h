// Launches a kernel: launch(kernel, grid, block, stream, arguments...); block: threads, or {threads, bytes of
// dynamic shared memory}. Asynchronous.

#pragma once

#ifdef CU_FAST_EMULATED
#include "emulation/launch.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace cu_fast {

struct Grid2 {
  int64_t x, y = 1;
};

struct BlockSize {
  BlockSize(int threads, int dynamic_shared = 0) : threads(threads), dynamic_shared(dynamic_shared) {}
  int threads, dynamic_shared;
};

using Stream = cudaStream_t;

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("cu_fast: ") + what + ": " + cudaGetErrorString(error));
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "no CUDA device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "a device's attribute");
  return value;
}

inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

// Every kernel calls start_kernel() first, so the next one may be set up before this one ends (programmatic
// stream serialization, sm_90 and newer).
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid2 grid, BlockSize block, Stream stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(block.threads);
  config.dynamicSmemBytes = block.dynamic_shared;
  config.stream = stream;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  if (block.dynamic_shared > 0) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, block.dynamic_shared),
        "a kernel's dynamic shared memory");
  }
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "a kernel did not start");
}

}  // namespace cu_fast

#endif
