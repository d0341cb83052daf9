// Vec for NEON: 16 lanes in four registers. What each operation does: vec_scalar.h.

#pragma once

#include <arm_neon.h>

#include <bit>
#include <cstdint>

#include "core/fixed.h"
#include "core/widen.h"
#include "cpu/grid.h"
#include "cpu/simd.h"
#include "cpu/vec_scalar.h"

CU_FAST_TARGET_BEGIN(CU_FAST_NEON)
namespace cu_fast::neon {

// Hides that of core/scan.h: sdot takes s8 x s8, and Bytes::load makes codes signed, without an offset to cancel.
inline constexpr int kOffset = 0;

struct Vec {
  static constexpr int kSums = 4;

  float32x4_t a, b, c, d;

  static Vec broadcast(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {v, v, v, v};
  }

  template <class T>
  static Vec load(const T* from) {
    return {four(from), four(from + 4), four(from + 8), four(from + 12)};
  }

  template <class T>
  void store(T* to) const {
    put(a, to), put(b, to + 4), put(c, to + 8), put(d, to + 12);
  }

  static uint32_t at_least(Vec x, Vec y) {
    return bits(vcgeq_f32(x.a, y.a), vcgeq_f32(x.b, y.b), vcgeq_f32(x.c, y.c), vcgeq_f32(x.d, y.d));
  }

  static uint32_t not_below(Vec x, Vec y) {
    return 0xffff ^ bits(vcltq_f32(x.a, y.a), vcltq_f32(x.b, y.b), vcltq_f32(x.c, y.c), vcltq_f32(x.d, y.d));
  }

  void store_lanes(uint32_t lanes, float* to) const {
    float all[kLanes];
    store(all);
    for (; lanes != 0; lanes &= lanes - 1) *to++ = all[std::countr_zero(lanes)];
  }

  Vec magnitude() const { return {vabsq_f32(a), vabsq_f32(b), vabsq_f32(c), vabsq_f32(d)}; }
  Vec nearest() const { return {vrndnq_f32(a), vrndnq_f32(b), vrndnq_f32(c), vrndnq_f32(d)}; }
  static Vec larger(Vec x, Vec y) {
    return {larger(x.a, y.a), larger(x.b, y.b), larger(x.c, y.c), larger(x.d, y.d)};
  }
  void store_bytes(int8_t* to) const {
    const int16x8_t low = vcombine_s16(vmovn_s32(vcvtq_s32_f32(a)), vmovn_s32(vcvtq_s32_f32(b)));
    const int16x8_t high = vcombine_s16(vmovn_s32(vcvtq_s32_f32(c)), vmovn_s32(vcvtq_s32_f32(d)));
    vst1q_s8(to, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  }

  Vec cut() const { return {cut(a), cut(b), cut(c), cut(d)}; }
  Vec relu() const { return {relu(a), relu(b), relu(c), relu(d)}; }

 private:
  static float32x4_t four(const float* from) { return vld1q_f32(from); }
  static float32x4_t four(const Bf16* from) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&from->bits), 16));
  }
  static float32x4_t four(const Half* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
  }
  static float32x4_t four(const int32_t* from) { return vcvtq_f32_s32(vld1q_s32(from)); }
  static float32x4_t four(const int64_t* from) {  // there is no vector instruction that rounds once
    const float lanes[4] = {static_cast<float>(from[0]), static_cast<float>(from[1]),
                            static_cast<float>(from[2]), static_cast<float>(from[3])};
    return vld1q_f32(lanes);
  }

  static void put(float32x4_t v, float* to) { vst1q_f32(to, v); }
  static void put(float32x4_t v, Bf16* to) {  // narrow() of core/widen.h
    const uint32x4_t all = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(all, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(all, vdupq_n_u32(0x7fff)), odd);
    vst1_u16(&to->bits, vbsl_u16(vmovn_u32(vceqq_f32(v, v)), vshrn_n_u32(rounded, 16), vdup_n_u16(0x7fc0)));
  }
  static void put(float32x4_t v, Half* to) { vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

  // Bit l: lane l of the four masks is set.
  static uint32_t bits(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
    const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
    const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
    const uint8x16_t all = vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
    const uint8x8_t bit = vcreate_u8(0x8040201008040201);
    uint8x16_t sums = vandq_u8(all, vcombine_u8(bit, bit));
    for (int i = 0; i < 3; ++i) sums = vpaddq_u8(sums, sums);
    return vgetq_lane_u16(vreinterpretq_u16_u8(sums), 0);
  }

  // Not fmax or fmaxnm: of NaN and a number one returns NaN, the other the number, whichever is y.
  static float32x4_t larger(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
  static float32x4_t cleared(float32x4_t v, uint32x4_t lanes) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), lanes));
  }
  static float32x4_t cut(float32x4_t v) { return cleared(v, vcaltq_f32(v, vdupq_n_f32(kLeast))); }
  static float32x4_t relu(float32x4_t v) { return cleared(v, vcltzq_f32(v)); }
};

inline Vec operator+(Vec x, Vec y) {
  return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
}
inline Vec operator-(Vec x, Vec y) {
  return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c), vsubq_f32(x.d, y.d)};
}
inline Vec operator*(Vec x, Vec y) {
  return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)};
}
inline Vec operator/(Vec x, Vec y) {
  return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b), vdivq_f32(x.c, y.c), vdivq_f32(x.d, y.d)};
}

using scalar::keep_ids;
using scalar::store_ids;

struct Bytes {
  int8x16_t a, b, c, d;

  static Bytes load(const uint8_t* from) {  // c + 128 becomes c
    return {code(from), code(from + 16), code(from + 32), code(from + 48)};
  }
  // In lane 0 alone, which sdot multiplies all codes with. Not as an intrinsic: those that load a lane also fill or
  // keep the others, in a unit that sdot needs.
  static Bytes repeat(const int8_t* from) {
    using Four [[gnu::may_alias, gnu::aligned(1)]] = int32_t;
    int8x16_t v;
    asm volatile("ldr %s0, %1" : "=w"(v) : "m"(*reinterpret_cast<const Four*>(from)));
    return {v, v, v, v};
  }

 private:
  static int8x16_t code(const uint8_t* from) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(from), vdupq_n_u8(0x80)));
  }
};

using scalar::Words;

struct Ints {
  static constexpr int kTokens = 6,
                       kGroups = 1;  // 24 sums, 4 codes, a row, the codes' offset: 30 of 32 registers
  static constexpr int kRange = 127;
  // Words, and the tile that is made of them, are not reached: Pair takes any number of rows.
  static constexpr int kTileTokens = 1, kTileGroups = 1;

  int32x4_t a, b, c, d;

  static Ints broadcast(int32_t x) {
    const int32x4_t v = vdupq_n_s32(x);
    return {v, v, v, v};
  }
  void store(int32_t* to) const {
    vst1q_s32(to, a), vst1q_s32(to + 4, b), vst1q_s32(to + 8, c), vst1q_s32(to + 12, d);
  }
  // Volatile, as the load of the row, so that they stay in order: g++ 12 loads all rows first, and runs out of registers.
  void add_products(Bytes codes, Bytes row) {
    asm volatile(
        "sdot %0.4s, %4.16b, %8.4b[0]\n\tsdot %1.4s, %5.16b, %8.4b[0]\n\t"
        "sdot %2.4s, %6.16b, %8.4b[0]\n\tsdot %3.4s, %7.16b, %8.4b[0]"
        : "+&w"(a), "+&w"(b), "+&w"(c), "+&w"(d)
        : "w"(codes.a), "w"(codes.b), "w"(codes.c), "w"(codes.d), "w"(row.a));
  }
  void add_products(Words codes, Words row) {
    scalar::Ints sums = plain();
    sums.add_products(codes, row);
    const auto* const lanes = reinterpret_cast<const int32_t*>(sums.lane);
    *this = {vld1q_s32(lanes), vld1q_s32(lanes + 4), vld1q_s32(lanes + 8), vld1q_s32(lanes + 12)};
  }
  static void fold(Ints high, Ints low, Ints both, bool first, int64_t* to) {
    scalar::Ints::fold(high.plain(), low.plain(), both.plain(), first, to);
  }

 private:
  scalar::Ints plain() const {
    scalar::Ints r;
    store(reinterpret_cast<int32_t*>(r.lane));
    return r;
  }
};

// The nine products of digits: sdot takes them as they are. `x` holds the digits of q, of 64 columns at a time.
struct Pair {
  static constexpr int64_t kFewTokens = kBlockTokens;  // of words there is no such product

  static void cut(const float* q, int64_t width, int16_t* x) {
    auto* digits = reinterpret_cast<int8_t*>(x);
    for (int64_t e = 0; e < width; e += 64, digits += 3 * 64) {
      for (int64_t i = 0; i < 64; ++i) {
        const auto whole = static_cast<int32_t>(q[e + i]);
        digits[i] = static_cast<int8_t>((whole + 0x8080) >> 16);
        digits[64 + i] = static_cast<int8_t>((whole + 0x80) >> 8);
        digits[128 + i] = static_cast<int8_t>(whole);
      }
    }
  }

  [[gnu::noinline]] static void dots(const int16_t* const (&x)[4], const int8_t* const (&codes)[4],
                                     int64_t width, int64_t* sums) {
    // Digits i and j of pair n: level i + j. A lane stays below 2^31 / 2.
    int32x4_t level[5][4];
#pragma GCC unroll 5
    for (int l = 0; l < 5; ++l) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) level[l][n] = vdupq_n_s32(0);
    }
    for (int64_t e = 0; e < width; e += 64) {
      for (int64_t i = e; i < e + 64; i += 16) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          const auto* const digits = reinterpret_cast<const int8_t*>(x[n]) + 2 * e + i;
          const int8x16_t q0 = vld1q_s8(digits), q1 = vld1q_s8(digits + 64), q2 = vld1q_s8(digits + 128);
          const int8x16_t p0 = vld1q_s8(codes[n] + i), p1 = vld1q_s8(codes[n] + width + i),
                          p2 = vld1q_s8(codes[n] + 2 * width + i);
          level[0][n] = vdotq_s32(level[0][n], p0, q0);
          level[1][n] = vdotq_s32(level[1][n], p0, q1);
          level[2][n] = vdotq_s32(level[2][n], p0, q2);
          level[1][n] = vdotq_s32(level[1][n], p1, q0);
          level[2][n] = vdotq_s32(level[2][n], p1, q1);
          level[3][n] = vdotq_s32(level[3][n], p1, q2);
          level[2][n] = vdotq_s32(level[2][n], p2, q0);
          level[3][n] = vdotq_s32(level[3][n], p2, q1);
          level[4][n] = vdotq_s32(level[4][n], p2, q2);
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      int64_t sum = 0;
#pragma GCC unroll 5
      for (int l = 0; l < 5; ++l) sum = sum * 256 + vaddlvq_s32(level[l][n]);
      sums[n] = sum;
    }
  }
};

struct Tiles {};

}  // namespace cu_fast::neon
CU_FAST_TARGET_END
