// The mask of one token (core/mask.h). On a GPU the host does not check mask_row, so the kernel does.

#pragma once

#include "core/mask.h"
#include "cuda/device.h"

namespace cu_fast {

class MaskRow {
 public:
  CU_FAST_DEVICE MaskRow(const Mask& mask, int64_t token) {
    if (mask.row == nullptr) return;  // a table of 0 masks may have no address
    const int32_t row = mask.row[token];
    exists_ = row >= -1 && row < mask.U;
    if (exists_ && row >= 0) bits_ = mask.table + row * mask.words;
  }

  // Whether the token's mask_row is in [-1, U). If not, its results must be NaN.
  CU_FAST_DEVICE bool exists() const { return exists_; }

  // The bits of codes [first, first + 32); first is a multiple of 32. Codes beyond C are not deleted.
  CU_FAST_DEVICE uint32_t word(int64_t first, int64_t C) const {
    return bits_ == nullptr || first >= C ? 0 : bits_[first / 32];
  }

  CU_FAST_DEVICE bool deletes(int64_t code) const { return is_deleted(bits_, code); }

 private:
  const uint32_t* bits_ = nullptr;
  bool exists_ = true;
};

}  // namespace cu_fast
