// bf16 and fp16 as storage: widened exactly, narrowed with round to nearest, ties to even.

#pragma once

#include <bit>
#include <cstdint>

#include "core/portable.h"

namespace cu_fast {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

CU_FAST_BOTH inline float widen(float x) {
  return x;
}

CU_FAST_BOTH inline float widen(Bf16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}

CU_FAST_BOTH inline float widen(Half x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31;
  const uint32_t magnitude = uint32_t{x.bits} << 17 >> 4;  // exponent and fraction in fp32's bits
  if (magnitude >= 0x0f800000u) return std::bit_cast<float>(sign | 0x70000000u | magnitude);  // Inf, NaN
  // The exponent biases differ by 127 - 15 = 112. The product is exact, and right for subnormals too.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f));
}

CU_FAST_BOTH inline void narrow(float x, float* out) {
  *out = x;
}

CU_FAST_BOTH inline void narrow(float x, Bf16* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>(rounded);
}

CU_FAST_BOTH inline void narrow(float x, Half* out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x1ffu);  // NaN: quiet, the rest of its payload kept
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to Inf
  } else if (magnitude < 0x38800000u) {
    // Subnormal: one unit in the last place of 0.5f is 2^-24, fp16's smallest number, so this addition
    // rounds.
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace cu_fast
