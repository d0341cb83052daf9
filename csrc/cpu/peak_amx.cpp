// The peak rate of byte products on tiles, with operands in the L1 cache. The other peaks are those of AVX-512.

#include "cpu/baseline.h"
#include "cpu/vec_amx.h"

CU_FAST_TARGET_BEGIN(CU_FAST_AVX512)
namespace cu_fast::amx {
#include "cpu/rows-inl.h"
#include "cpu/fixed-inl.h"
#include "cpu/scan-inl.h"
#include "cpu/scan_tiles-inl.h"

int64_t peak_int8(int64_t iterations, int32_t* out) {
  constexpr int64_t kWidth = 256, kStride = kWidth + 64;
  alignas(64) int8_t rows[kTileTokens * kStride];
  alignas(64) uint8_t codes[kWidth * kScanGroup];
  alignas(64) int32_t sums[kTileTokens * kScanGroup];
  for (size_t i = 0; i < sizeof rows; ++i) rows[i] = static_cast<int8_t>(i % 64);
  for (size_t i = 0; i < sizeof codes; ++i) codes[i] = static_cast<uint8_t>(i);
  const Tiles tiles;
  for (int64_t i = 0; i < iterations; ++i) {
    multiply_32(rows, kWidth, kStride, codes, codes + sizeof codes - kStepBytes, nullptr, 0, sums);
    *out ^= sums[i % kScanGroup];
  }
  return iterations * kWidth * kTileTokens * kScanGroup * 2;
}

}  // namespace cu_fast::amx
CU_FAST_TARGET_END
