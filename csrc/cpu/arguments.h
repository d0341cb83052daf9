// From tensors to the structs of core/params.h, checked. Tensors that a struct points into must outlive it.

#pragma once

#include <optional>

#include "check.h"
#include "core/params.h"

#include <torch/csrc/stable/ops.h>

namespace cu_fast {

using OptionalTensor = std::optional<Tensor>;

// Rows as they are if each is contiguous; otherwise a copy.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline Matrix matrix_of(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  const Dtype dtype = s == ScalarType::Float      ? Dtype::f32
                      : s == ScalarType::BFloat16 ? Dtype::bf16
                                                  : Dtype::f16;
  return {t.const_data_ptr(), t.stride(0), dtype};
}

// A small vector in fp32, contiguous; null stays null.
inline OptionalTensor as_fp32(const char* name, const OptionalTensor& t, const char* letters,
                              std::initializer_list<int64_t> sizes) {
  if (!t) return std::nullopt;
  check_shape(name, *t, letters, sizes);
  check_float(name, *t);
  return torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float));
}

inline const float* data_of(const OptionalTensor& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// A mask table and its rows, contiguous and checked.
class MaskArguments {
 public:
  MaskArguments(const OptionalTensor& table, const OptionalTensor& row, int64_t T, int64_t C)
      : words_((C + 31) / 32) {
    check(table.has_value() == row.has_value(), "mask_table and mask_row must be given together, got only ",
          table ? "mask_table" : "mask_row");
    if (!table) return;
    check_shape("mask_table", *table, "[U, ceil(C / 32)]", {-1, words_});
    check_dtype("mask_table", *table, ScalarType::Int);
    check_shape("mask_row", *row, "[T]", {T});
    check_dtype("mask_row", *row, ScalarType::Int);
    table_ = torch::stable::contiguous(*table);
    row_ = torch::stable::contiguous(*row);
    check_range("mask_row", row_->const_data_ptr<int32_t>(), T, 1, -1, table->size(0));
  }

  Mask mask() const {
    if (!table_) return {nullptr, 0, nullptr};
    return {static_cast<const uint32_t*>(table_->const_data_ptr()), words_, row_->const_data_ptr<int32_t>()};
  }

 private:
  int64_t words_;
  OptionalTensor table_, row_;
};

// Uninitialised memory from the framework's allocator (64-byte aligned).
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

}  // namespace cu_fast
