// What the library was built for: part of every library, with CUDA or without.

#include <string>

#ifdef CU_FAST_CUDA
#include <cuda_runtime_api.h>
#endif

#include "registration.h"

#ifndef CU_FAST_CUDA_BUILD  // setup.py sets it to the architectures
#define CU_FAST_CUDA_BUILD ""
#endif

namespace cu_fast {
namespace {

// setup.py reads this from the library, to see whether it holds what is asked for now.
[[gnu::used]] constexpr char kBuilt[] = "cu_fast CUDA build: " CU_FAST_CUDA_BUILD;

std::string cuda_build() {
  return kBuilt + sizeof("cu_fast CUDA build: ") - 1;
}

// Why the NVIDIA driver cannot run this library, or "": torch may be of an older CUDA, and work with it.
std::string cuda_driver_failure() {
#ifdef CU_FAST_CUDA
  constexpr int kMajor = CUDART_VERSION / 1000;
  constexpr const char* kNeeds = kMajor == 12 ? ", R525 or newer" : kMajor == 13 ? ", R580 or newer" : "";
  int driver = 0;
  cudaDriverGetVersion(&driver);  // without a driver it stays 0; any of the same major version will do
  if (driver / 1000 < kMajor)
    return "the NVIDIA driver is older than CUDA " + std::to_string(kMajor) +
           ", which the native library was built with; update the driver" + kNeeds +
           ", or install cu-fast again from its sources with an older CUDA toolkit";
#endif
  return "";
}

}  // namespace

bool built_for(const char* arch) {
  return (";" + cuda_build() + ";").find(";" + std::string(arch) + ";") != std::string::npos;
}

}  // namespace cu_fast

CU_FAST_IMPLEMENTATION(CU_FAST_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&cu_fast::cuda_build));
  m.impl("cuda_driver_failure", TORCH_BOX(&cu_fast::cuda_driver_failure));
}
