// Gather and sum for one token and a share of the columns, by a block of kDecodeThreads.
//
//   y = reduce_i(w_i table[id_i]) + bias + residual      in the order of i: multiply, then add, in fp32; y is
//                                                        rounded once more, to the table's dtype
//
//   what   shape     where it stays
//   slots  [kSlots]  shared: those in use
//   table  [C, D]    global -> registers
//   y      [T, D]    registers, 8 columns per thread
//
// 1. The first warp reads kSlots slots at a time and keeps, in their order, those whose code is not deleted.
// 2. A thread owns 8 neighbouring columns, 16 bytes of a 16-bit table, and has kInFlight rows in flight.
//
// A slot without a code (id -1) adds nothing, but if its weight is NaN the row is NaN. So is a row with an id
// that is not in the table, or whose mask row does not exist: on a GPU the host does not check them, and NaN
// is how a kernel reports it.

#pragma once

#include "core/params.h"
#include "cuda/device.h"
#include "cuda/load.h"
#include "cuda/mask.h"

namespace cu_fast {

inline constexpr int kDecodeThreads = 64;
inline constexpr int kDecodeColumns = 8 * kDecodeThreads;  // columns per block
inline constexpr int kSlots = 128;
inline constexpr int kInFlight = 8;

struct DecodeShared {
  DecodeSlot slots[kSlots];
  int32_t used;
  uint32_t faulty;
};

CU_FAST_DEVICE bool reads_eights(const Matrix& m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 8 == 0;
}

struct Eight {
  float x[8];
};

// Eight neighbours as they are stored; 16-bit types use the first half.
struct RawEight {
  uint4 half[2];
};

// Entries column .. column + 7, zeros beyond the width; `eights` is reads_eights(m).
CU_FAST_DEVICE RawEight load_raw_eight(const Matrix& m, bool eights, int64_t row, int64_t column,
                                       int64_t width) {
  if (m.dtype != Dtype::f32 && eights && column + 8 <= width) {
    const auto* const from = static_cast<const uint16_t*>(m.data) + row * m.stride + column;
    return {{*reinterpret_cast<const uint4*>(from), make_uint4(0, 0, 0, 0)}};
  }
  RawEight raw = {{load_raw(m, eights, row, column, width), load_raw(m, eights, row, column + 4, width)}};
  if (m.dtype != Dtype::f32) {
    raw.half[0].z = raw.half[1].x;
    raw.half[0].w = raw.half[1].y;
  }
  return raw;
}

CU_FAST_DEVICE Eight widen_eight(const RawEight& raw, Dtype dtype) {
  uint4 first = raw.half[0], second = raw.half[1];
  if (dtype != Dtype::f32) second = make_uint4(first.z, first.w, 0, 0);
  const float4 low = widen_four(first, dtype), high = widen_four(second, dtype);
  return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

template <class T>
CU_FAST_DEVICE void store_eight(const Eight& from, void* y, int64_t D, int64_t row, int64_t column) {
  T* const at = static_cast<T*>(y) + row * D + column;
  alignas(16) T narrowed[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) narrow(from.x[i], &narrowed[i]);
  if (column + 8 <= D && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
      reinterpret_cast<uint4*>(at)[i] = reinterpret_cast<const uint4*>(narrowed)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < D) at[i] = narrowed[i];
    }
  }
}

// Writes columns [first, first + kDecodeColumns) of a token. slot(i) returns the i-th of p.k slots; p.ids and
// p.weights are not read. Returns, to all threads of the first warp, how many codes the mask took away.
template <class Slot>
CU_FAST_DEVICE int32_t decode_columns(const DecodeParams& p, int64_t token, int64_t first, const Slot& slot,
                                      DecodeShared& shared) {
  const MaskRow mask(p.mask, token);
  const bool eights = reads_eights(p.table);
  const int64_t column = first + 8 * thread_index();
  Eight sum = {};
  int32_t taken = 0;
  sync_block();
  if (thread_index() == 0) shared.faulty = mask.exists() ? 0 : 1;
  for (int64_t begin = 0; begin < p.k; begin += kSlots) {
    sync_block();  // the previous slots have been read
    if (warp_index() == 0) {
      int32_t used = 0;
      for (int64_t at = begin; at < begin + kSlots && at < p.k; at += 32) {
        const int64_t i = at + lane_index();
        const DecodeSlot mine = i < p.k ? slot(i) : DecodeSlot{-1, 0};
        const bool is_code = mine.id >= 0 && mine.id < p.C;
        if (!is_code && (mine.id != -1 || mine.weight != mine.weight)) atomic_or(&shared.faulty, 1u);
        const bool deleted = is_code && mask.deletes(mine.id);
        const uint32_t uses = ballot(is_code && !deleted);
        taken += count_bits(ballot(deleted));
        if (is_code && !deleted) shared.slots[used + count_bits(uses & ((1u << lane_index()) - 1))] = mine;
        used += count_bits(uses);
      }
      if (lane_index() == 0) shared.used = used;
    }
    sync_block();
    if (column >= p.D) continue;
    for (int i = 0; i < shared.used; i += kInFlight) {
      RawEight rows[kInFlight];
#pragma unroll
      for (int r = 0; r < kInFlight; ++r) {
        if (i + r < shared.used)
          rows[r] = load_raw_eight(p.table, eights, shared.slots[i + r].id, column, p.D);
      }
#pragma unroll
      for (int r = 0; r < kInFlight; ++r) {
        if (i + r >= shared.used) break;
        const float weight = shared.slots[i + r].weight;
        const Eight row = widen_eight(rows[r], p.table.dtype);
#pragma unroll
        for (int c = 0; c < 8; ++c) sum.x[c] = add(sum.x[c], multiply(weight, row.x[c]));
      }
    }
  }
  if (column >= p.D) return taken;
  Eight residual = {};
  if (p.residual.data != nullptr) {
    const bool whole = reads_eights(p.residual);
    residual = widen_eight(load_raw_eight(p.residual, whole, token, column, p.D), p.residual.dtype);
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    float y = sum.x[c];
    if (p.mean) y = y / static_cast<float>(p.k);
    if (p.bias != nullptr && column + c < p.D) y = add(y, p.bias[column + c]);
    if (p.residual.data != nullptr) y = add(y, residual.x[c]);
    sum.x[c] = shared.faulty != 0 ? quiet_nan() : y;
  }
  if (p.table.dtype == Dtype::f32) {
    store_eight<float>(sum, p.y, p.D, token, column);
  } else if (p.table.dtype == Dtype::bf16) {
    store_eight<Bf16>(sum, p.y, p.D, token, column);
  } else {
    store_eight<Half>(sum, p.y, p.D, token, column);
  }
  return taken;
}

}  // namespace cu_fast
