// From tensors to the structs of core/params.h, checked. Tensors that a struct points into must outlive it.

#pragma once

#include <algorithm>
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

// A scan plane, as pack_scan made it.
class ScanArguments {
 public:
  ScanArguments(const OptionalTensor& plane, const OptionalTensor& terms, const OptionalTensor& mean,
                int64_t C, int64_t E) {
    check(plane.has_value() == terms.has_value() && plane.has_value() == mean.has_value(),
          "scan_plane, scan_terms and scan_mean must be given together");
    if (!plane) return;
    check_shape("scan_plane", *plane, "[ceil(C / 64), ceil(E / 4), 64, 4]",
                {scan_groups(C), scan_width(E) / 4, kScanGroup, 4});
    check_dtype("scan_plane", *plane, ScalarType::Byte);
    check_shape("scan_terms", *terms, "[ceil(C / 64), 196]", {scan_groups(C), kTermsOfGroup});
    check_dtype("scan_terms", *terms, ScalarType::Float);
    check_shape("scan_mean", *mean, "[E]", {E});
    check_dtype("scan_mean", *mean, ScalarType::Float);
    plane_ = torch::stable::contiguous(*plane);
    terms_ = torch::stable::contiguous(*terms);
    mean_ = torch::stable::contiguous(*mean);
  }

  ScanPlane plane() const {
    if (!plane_) return {};
    const float* const mean = data_of(mean_);
    const bool centred = std::any_of(mean, mean + mean_->numel(), [](float x) { return x != 0; });
    return {static_cast<const uint8_t*>(plane_->const_data_ptr()), data_of(terms_), centred ? mean : nullptr};
  }

 private:
  OptionalTensor plane_, terms_, mean_;
};

// Uninitialised memory from the framework's allocator (64-byte aligned).
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

}  // namespace cu_fast
