// Which codes are deleted for which token: U bitsets, and for each token the bitset that holds.

#pragma once

#include <cstdint>

#include "core/portable.h"

namespace cu_fast {

// Bit j % 32 of word j / 32: set, and code j is deleted. A null bitset deletes nothing.
CU_FAST_BOTH inline bool is_deleted(const uint32_t* bits, int64_t code) {
  return bits != nullptr && (bits[code / 32] >> (code % 32) & 1) != 0;
}

// The bits of codes [64 g, 64 g + 64) of C.
CU_FAST_BOTH inline uint64_t deleted_of_group(const uint32_t* bits, int64_t g, int64_t C) {
  const uint64_t high = 64 * g + 32 < C ? bits[2 * g + 1] : 0;
  return high << 32 | bits[2 * g];
}

struct Mask {
  const uint32_t* table;  // [U, W]; null: no mask
  int64_t words;          // W = ceil(C / 32)
  const int32_t* row;     // [T], in [-1, U); -1: nothing is deleted for this token
  int64_t U;

  CU_FAST_BOTH const uint32_t* bits(int64_t token) const {
    return table == nullptr || row[token] < 0 ? nullptr : table + row[token] * words;
  }
};

}  // namespace cu_fast
