// From tensors to the structs of core/params.h, checked. Tensors that a struct points into must outlive it.

#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "core/params.h"

#include <torch/csrc/stable/ops.h>

namespace cu_fast {

using OptionalTensor = std::optional<Tensor>;

// The tensor itself if it is contiguous; otherwise a copy. A call by name costs half a microsecond, also one that
// has nothing to do.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

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
  return as_contiguous(t->scalar_type() == ScalarType::Float ? *t : torch::stable::to(*t, ScalarType::Float));
}

inline const float* data_of(const OptionalTensor& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// Where tensors lie: values on a device are not looked at, that would wait for it. Its kernels check them
// instead.
enum class Values { readable, on_device };

// What operators take together, not checked yet.
struct MaskTensors {
  const OptionalTensor &table, &row;
};

struct ScanTensors {
  const OptionalTensor &plane, &terms, &mean;
};

// A mask table and its rows, contiguous and checked.
class MaskArguments {
 public:
  MaskArguments(const MaskTensors& in, int64_t T, int64_t C, Values values) : words_((C + 31) / 32) {
    const auto& [table, row] = in;
    check(table.has_value() == row.has_value(), "mask_table and mask_row must be given together, got only ",
          table ? "mask_table" : "mask_row");
    if (!table) return;
    check_shape("mask_table", *table, "[U, ceil(C / 32)]", {-1, words_});
    check_dtype("mask_table", *table, ScalarType::Int);
    check_shape("mask_row", *row, "[T]", {T});
    check_dtype("mask_row", *row, ScalarType::Int);
    table_ = as_contiguous(*table);
    row_ = as_contiguous(*row);
    U_ = table->size(0);
    if (values == Values::readable)
      checked_row_ = checked_copy("mask_row", row_->const_data_ptr<int32_t>(), T, 1, -1, U_);
  }

  Mask mask() const {
    if (!table_) return {};
    return {static_cast<const uint32_t*>(table_->const_data_ptr()), words_,
            checked_row_.empty() ? row_->const_data_ptr<int32_t>() : checked_row_.data(), U_};
  }

 private:
  int64_t words_, U_ = 0;
  OptionalTensor table_, row_;
  std::vector<int32_t> checked_row_;  // empty: values on a device
};

// A scan plane, as pack_scan made it.
class ScanArguments {
 public:
  ScanArguments(const ScanTensors& in, int64_t C, int64_t E) {
    const auto& [plane, terms, mean] = in;
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
    plane_ = as_contiguous(*plane);
    terms_ = as_contiguous(*terms);
    mean_ = as_contiguous(*mean);
  }

  ScanPlane plane(Values values) const {
    if (!plane_) return {};
    const float* const mean = data_of(mean_);
    const bool centred = values == Values::on_device ||
                         std::any_of(mean, mean + mean_->numel(), [](float x) { return x != 0; });
    return {static_cast<const uint8_t*>(plane_->const_data_ptr()), data_of(terms_), centred ? mean : nullptr};
  }

 private:
  OptionalTensor plane_, terms_, mean_;
};

// What is scored, checked, and kept alive for the pointers in `score`: dense or selected, of a bottleneck or
// alone.
struct ScoreArguments {
  Tensor z, digits, factor;
  OptionalTensor pre, bias;
  ScoreParams score;
};

// What an operator calls them.
struct ScoreNames {
  const char *z, *z_letters, *digits, *digits_letters, *factor, *bias, *bias_letters;
};
inline constexpr ScoreNames kQuantizeNames = {"z",      "[T, E]", "digits", "[C, 3, round_up(E, 64)]",
                                              "factor", "bias",   "[C]"};
inline constexpr ScoreNames kEncodeNames = {"x",        "[T, D]", "W_digits", "[E, 3, round_up(D, 64)]",
                                            "W_factor", "b_enc",  "[E]"};

// Rows of weights, as pack_digits made them: contiguous, 16-byte aligned.
inline Tensor digits_argument(const char* name, const Tensor& t, const char* letters, int64_t E) {
  check(E <= kMostWidth, name, " is of rows of ", E, " entries, must be at most ", kMostWidth);
  check_shape(name, t, letters, {-1, kDigits, digit_width(E)});
  check_dtype(name, t, ScalarType::Char);
  const Tensor digits = as_contiguous(t);
  check(reinterpret_cast<uintptr_t>(digits.const_data_ptr()) % 16 == 0, name,
        " must start at a multiple of 16 bytes");
  return digits;
}

inline ScoreArguments score_arguments(const ScoreNames& names, const Tensor& z_in, const Tensor& digits_in,
                                      const Tensor& factor_in, const OptionalTensor& pre_in,
                                      const OptionalTensor& bias_in) {
  check_shape(names.z, z_in, names.z_letters, {-1, -1});
  check_float(names.z, z_in);
  const int64_t T = z_in.size(0), E = z_in.size(1);
  const Tensor digits = digits_argument(names.digits, digits_in, names.digits_letters, E);
  const int64_t C = digits.size(0);
  check_shape(names.factor, factor_in, names.bias_letters, {C});
  check_dtype(names.factor, factor_in, ScalarType::Float);
  const Tensor factor = as_contiguous(factor_in);
  const OptionalTensor bias = as_fp32(names.bias, bias_in, names.bias_letters, {C});
  const OptionalTensor pre = as_fp32("b_pre", pre_in, "[D]", {E});
  const Tensor z = with_contiguous_rows(z_in);
  return {z,
          digits,
          factor,
          pre,
          bias,
          {matrix_of(z), digits.const_data_ptr<int8_t>(), factor.const_data_ptr<float>(), data_of(bias),
           data_of(pre), T, C, E}};
}

// What a selection is asked; p has neither memory nor results. `in` must outlive it.
class SelectArguments {
 public:
  SelectArguments(const ScoreArguments& in, const ScanTensors& scan, int64_t k, const MaskTensors& mask,
                  Values values)
      : scan_(scan, in.score.C, in.score.E), mask_(mask, in.score.T, in.score.C, values) {
    const int64_t C = in.score.C;
    check(C <= std::numeric_limits<int32_t>::max(), "there are ", C, " codes, must be fewer than 2^31");
    check(k >= 1 && k <= C, "k is ", k, ", must be in [1, C] = [1, ", C, "]");
    p.score = in.score;
    p.scan = scan_.plane(values);
    p.mask = mask_.mask();
    p.k = k;
  }

  SelectParams p = {};

 private:
  const ScanArguments scan_;
  const MaskArguments mask_;
};

// What is decoded, likewise; p has no y.
struct DecodeArguments {
  Tensor ids, table;
  OptionalTensor weights, bias, residual;
  std::vector<int32_t> checked_ids;  // empty: values on a device
  MaskArguments mask;
  DecodeParams p;
};

inline DecodeArguments decode_arguments(const Tensor& ids_in, const OptionalTensor& weights_in,
                                        const Tensor& table_in, const OptionalTensor& bias_in,
                                        const OptionalTensor& residual_in, const MaskTensors& mask_in,
                                        bool mean, Values values) {
  check_shape("ids", ids_in, "[T, k]", {-1, -1});
  check_dtype("ids", ids_in, ScalarType::Int);
  check_shape("table", table_in, "[C, D]", {-1, -1});
  check_float("table", table_in);
  const int64_t T = ids_in.size(0), k = ids_in.size(1), C = table_in.size(0), D = table_in.size(1);
  check(k >= 1, "ids must have at least one column, got ", describe(ids_in));
  const Tensor ids = as_contiguous(ids_in), table = with_contiguous_rows(table_in);
  const OptionalTensor weights = as_fp32("weights", weights_in, "[T, k]", {T, k});
  const OptionalTensor bias = as_fp32("bias", bias_in, "[D]", {D});
  OptionalTensor residual;
  if (residual_in) {
    check_shape("residual", *residual_in, "[T, D]", {T, D});
    check_float("residual", *residual_in);
    residual = with_contiguous_rows(*residual_in);
  }
  const int32_t* const given = ids.const_data_ptr<int32_t>();
  std::vector<int32_t> checked_ids;
  if (values == Values::readable) checked_ids = checked_copy("ids", given, T, k, -1, C);
  MaskArguments mask(mask_in, T, C, values);
  const DecodeParams p = {.ids = checked_ids.empty() ? given : checked_ids.data(),
                          .weights = data_of(weights),
                          .table = matrix_of(table),
                          .bias = data_of(bias),
                          .residual = residual ? matrix_of(*residual) : Matrix{},
                          .mask = mask.mask(),
                          .mean = mean,
                          .T = T,
                          .C = C,
                          .D = D,
                          .k = k};
  return {ids, table, weights, bias, residual, std::move(checked_ids), std::move(mask), p};
}

// Two numbers that a bottleneck adds to in place.
inline int64_t* receipt_of(const OptionalTensor& receipt) {
  if (!receipt) return nullptr;
  check_shape("receipt", *receipt, "[2]", {2});
  check_dtype("receipt", *receipt, ScalarType::Long);
  check(receipt->stride(0) == 1, "receipt must be contiguous, its stride is ", receipt->stride(0));
  return receipt->mutable_data_ptr<int64_t>();
}

// Uninitialised memory of the CPU from the framework's allocator (64-byte aligned). Not torch::stable::empty, a call
// by name: a bottleneck takes nine of these.
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes.begin()[d]))
    strides.at(d) = stride;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace cu_fast
