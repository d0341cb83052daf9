// Chooses the instruction set: the best that the CPU has, or the one that CU_FAST_SIMD names.

#include "cpu/simd.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <string>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "check.h"
#include "registration.h"

namespace cu_fast {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "amx", "neon"};
constexpr SimdLevel kLevels[] = {SimdLevel::scalar, SimdLevel::avx2, SimdLevel::avx512, SimdLevel::amx,
                                 SimdLevel::neon};

const char* name_of(SimdLevel level) {
  return kNames[static_cast<int>(level)];
}

#if defined(__x86_64__) && defined(__linux__)

// Defined where tests emulate the instructions of tiles, whatever the CPU has (tests/helpers/tiles.cpp).
extern "C" __attribute__((weak)) bool cu_fast_emulates_tiles();

// Whether the CPU has tiles of bytes, and the kernel lets this process use them: it has to be asked once, and keeps room
// for tiles in every thread's state from then on.
bool has_tiles() {
  if (cu_fast_emulates_tiles != nullptr && cu_fast_emulates_tiles()) return true;
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  unsigned a, b, c, features = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &features) != 0 && (features & kAmxTile) != 0 &&
         (features & kAmxInt8) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

bool has_tiles() {
  return false;
}

#endif

bool is_supported(SimdLevel level) {
#if defined(__x86_64__)
  switch (level) {
    case SimdLevel::scalar:
      return true;
    case SimdLevel::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    case SimdLevel::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni") && is_supported(SimdLevel::avx2);
    case SimdLevel::amx:
      return is_supported(SimdLevel::avx512) && has_tiles();
    default:
      return false;
  }
#elif defined(__aarch64__) && defined(__linux__)
  return level == SimdLevel::scalar || (level == SimdLevel::neon && getauxval(AT_HWCAP) & HWCAP_ASIMDDP);
#else
  return level == SimdLevel::scalar;
#endif
}

struct Choice {
  SimdLevel level = SimdLevel::scalar;
  std::string error;  // empty: the CPU has the level
};

Choice choose(const char* wanted) {
  Choice choice;
  std::string supported;
  for (SimdLevel level : kLevels) {
    if (!is_supported(level)) continue;
    choice.level = level;
    supported += (supported.empty() ? "" : ", ") + std::string(name_of(level));
  }
  if (wanted == nullptr || *wanted == '\0') return choice;
  for (SimdLevel level : kLevels) {
    if (std::string(wanted) != name_of(level)) continue;
    choice.level = level;
    if (!is_supported(level)) {
      choice.error =
          "CU_FAST_SIMD is " + std::string(wanted) + ", which this machine lacks; it has " + supported;
    }
    return choice;
  }
  choice.error = "CU_FAST_SIMD is '" + std::string(wanted) + "', must be scalar, avx2, avx512, amx or neon";
  return choice;
}

// Read once, when the library is loaded. An error is raised by the first call.
const Choice kChoice = choose(std::getenv("CU_FAST_SIMD"));

std::string simd_level_name() {
  return name_of(simd_level());
}

}  // namespace

SimdLevel simd_level() {
  check(kChoice.error.empty(), kChoice.error);
  return kChoice.level;
}

}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&cu_fast::simd_level_name));
}
