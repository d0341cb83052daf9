// Masks: which codes are deleted for which token.
//
//   what   shape           layout
//   table  [U, W] uint32   U bitsets, W = ceil(C / 32); bit j % 32 of word j / 32 is set if code j is deleted
//   row    [T] int32       each token's bitset, in [-1, U); -1: nothing is deleted

#pragma once

#include <cstdint>

#include "core/portable.h"

namespace cu_fast {

// Whether a bitset deletes the code. A null bitset deletes nothing.
CU_FAST_BOTH inline bool is_deleted(const uint32_t* bits, int64_t code) {
  return bits != nullptr && (bits[code / 32] >> (code % 32) & 1) != 0;
}

// The bits of codes [64 g, 64 g + 64). The last group may have a single word: W = ceil(C / 32) can be odd.
CU_FAST_BOTH inline uint64_t deleted_of_group(const uint32_t* bits, int64_t g, int64_t C) {
  const uint64_t high = 64 * g + 32 < C ? bits[2 * g + 1] : 0;
  return high << 32 | bits[2 * g];
}

struct Mask {
  const uint32_t* table;  // [U, W]; null: nothing is deleted
  int64_t words;          // W = ceil(C / 32)
  const int32_t* row;     // [T], in [-1, U); -1: nothing is deleted
  int64_t U;

  CU_FAST_BOTH const uint32_t* bits(int64_t token) const {
    return table == nullptr || row[token] < 0 ? nullptr : table + row[token] * words;
  }
};

}  // namespace cu_fast
