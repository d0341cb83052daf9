// cuda/launch.h on a CPU: launch() runs the whole grid before it returns. It throws a kernel's error as a
// std::runtime_error.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace cu_fast {

struct Grid2 {
  int64_t x, y = 1;
};

struct BlockSize {
  BlockSize(int threads, int dynamic_shared = 0) : threads(threads), dynamic_shared(dynamic_shared) {}
  int threads, dynamic_shared;
};

using Stream = void*;

// The order of threads follows from the seed and the number of launches since it was set.
void set_emulation_seed(uint64_t seed);

// The signatures of the kernels that have run since the last call, one per line.
std::string launched_kernels();

// Small, so that grids are small. CU_FAST_EMULATED_MULTIPROCESSORS=n or the function below set another
// number.
int multiprocessors();
void set_emulated_multiprocessors(int count);

// Whether kernels for sm_90a are chosen where there are others too; true by default.
bool emulated_hopper();
void set_emulated_hopper(bool chosen);

namespace emulation {

inline constexpr std::size_t kParameterBytes = 4096;  // CUDA's limit

void run_grid(Grid2 grid, BlockSize size, void (*body)(const void*), const void* context);

}  // namespace emulation

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid2 grid, BlockSize size, Stream,
            const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "parameters are copied byte by byte");
  static_assert((sizeof(Parameters) + ... + 0) <= emulation::kParameterBytes,
                "CUDA passes at most 4096 bytes of kernel parameters");
  const auto body = [&] { kernel(Parameters(arguments)...); };
  const auto run = [](const void* context) { (*static_cast<const decltype(body)*>(context))(); };
  emulation::run_grid(grid, size, run, &body);
}

}  // namespace cu_fast
