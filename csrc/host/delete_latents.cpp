// Deletion of latents from a hidden state that is kept.
//
//   pre_i = enc_i . (rho x_t) + bias_i      y[t] = residual_t + sigma sum_i (new_i - a_i) dec_i
//
// Checked: one device; shapes and dtypes; and, where values can be read, that every mask row exists. Latents are
// not: a mask that lists one that does not exist makes its tokens NaN, on every device.

#include <tuple>

#include "host/devices.h"
#include "registration.h"

namespace cu_fast {
namespace {

Tensor fp32_matrix(const char* name, const Tensor& t, const char* letters,
                   std::initializer_list<int64_t> sizes) {
  check_shape(name, t, letters, sizes);
  check_dtype(name, t, ScalarType::Float);
  return with_contiguous_rows(t);
}

// A vector or a table, contiguous.
Tensor contiguous(const char* name, const Tensor& t, const char* letters,
                  std::initializer_list<int64_t> sizes, ScalarType dtype) {
  check_shape(name, t, letters, sizes);
  check_dtype(name, t, dtype);
  return as_contiguous(t);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> delete_latents(
    const Tensor& x_in, const OptionalTensor& residual_in, const Tensor& digits_in, const Tensor& factor_in,
    const Tensor& bias_in, const Tensor& theta_in, const Tensor& dec_in, int64_t scale, double norm,
    const Tensor& mask_latents_in, const Tensor& mask_change_in, const Tensor& mask_row_in,
    const OptionalTensor& floor_scores_in, const OptionalTensor& floor_ids_in) {
  const Device device(x_in, "residual", residual_in, "enc_digits", digits_in, "enc_factor", factor_in, "bias",
                      bias_in, "theta", theta_in, "dec", dec_in, "mask_latents", mask_latents_in,
                      "mask_change", mask_change_in, "mask_row", mask_row_in, "floor_scores", floor_scores_in,
                      "floor_ids", floor_ids_in);
  check_shape("x", x_in, "[T, Din]", {-1, -1});
  check_float("x", x_in);
  const int64_t T = x_in.size(0), Din = x_in.size(1);
  const Tensor digits = digits_argument("enc_digits", digits_in, "[R, 3, round_up(Din, 64)]", Din);
  const int64_t R = digits.size(0);
  check(R >= 1 && R <= std::numeric_limits<int32_t>::max(), "enc_digits has ", R,
        " rows, must have at least one and fewer than 2^31");
  const Tensor factor = contiguous("enc_factor", factor_in, "[R]", {R}, ScalarType::Float);
  const Tensor dec = fp32_matrix("dec", dec_in, "[R, Dout]", {R, -1});
  const int64_t Dout = dec.size(1);
  if (!residual_in && Dout != Din)
    check(false, "residual must be given where dec is not as wide as x: dec is ", describe(dec), ", x is ",
          describe(x_in));
  if (residual_in) {
    check_shape("residual", *residual_in, "[T, Dout]", {T, Dout});
    check_float("residual", *residual_in);
  }
  const Tensor x = with_contiguous_rows(x_in),
               residual = residual_in ? with_contiguous_rows(*residual_in) : x;
  const Tensor bias = contiguous("bias", bias_in, "[R]", {R}, ScalarType::Float);
  const Tensor theta = contiguous("theta", theta_in, "[R]", {R}, ScalarType::Float);
  check(scale >= 0 && scale <= 2, "scale is ", scale, ", must be 0, 1 or 2");
  const Tensor latents = contiguous("mask_latents", mask_latents_in, "[U, M]", {-1, -1}, ScalarType::Int);
  const int64_t U = latents.size(0), M = latents.size(1);
  check(M <= kMaxMaskLatents, "mask_latents lists ", M, " latents per mask, must be at most ",
        kMaxMaskLatents);
  const Tensor change = contiguous("mask_change", mask_change_in, "[U, M, 3]", {U, M, 3}, ScalarType::Float);
  const Tensor row = contiguous("mask_row", mask_row_in, "[T]", {T}, ScalarType::Int);
  check(floor_scores_in.has_value() == floor_ids_in.has_value(),
        "floor_scores and floor_ids must be given together, got only ",
        floor_scores_in ? "floor_scores" : "floor_ids");
  OptionalTensor floor_scores, floor_ids;
  if (floor_scores_in) {
    floor_scores = contiguous("floor_scores", *floor_scores_in, "[T]", {T}, ScalarType::Float);
    floor_ids = contiguous("floor_ids", *floor_ids_in, "[T]", {T}, ScalarType::Int);
  }
  const int32_t* const given = row.const_data_ptr<int32_t>();
  std::vector<int32_t> checked_row;  // empty: values on a device
  if (Device::kValues == Values::readable) checked_row = checked_copy("mask_row", given, T, 1, -1, U);

  Tensor y = device.empty({T, Dout}, residual.scalar_type());
  Tensor hits = device.empty({T}, ScalarType::Int);
  Tensor dose = device.empty({T}, ScalarType::Float);
  device.delete_latents({.x = matrix_of(x),
                         .residual = matrix_of(residual),
                         .digits = digits.const_data_ptr<int8_t>(),
                         .factor = factor.const_data_ptr<float>(),
                         .dec = matrix_of(dec),
                         .bias = bias.const_data_ptr<float>(),
                         .theta = theta.const_data_ptr<float>(),
                         .scale = static_cast<TokenScale>(scale),
                         .norm = static_cast<float>(norm),
                         .mask_latents = latents.const_data_ptr<int32_t>(),
                         .mask_change = change.const_data_ptr<float>(),
                         .mask_row = checked_row.empty() ? given : checked_row.data(),
                         .floor_scores = data_of(floor_scores),
                         .floor_ids = floor_ids ? floor_ids->const_data_ptr<int32_t>() : nullptr,
                         .T = T,
                         .Din = Din,
                         .Dout = Dout,
                         .R = R,
                         .U = U,
                         .M = M,
                         .y = y.mutable_data_ptr(),
                         .hits = hits.mutable_data_ptr<int32_t>(),
                         .dose = dose.mutable_data_ptr<float>()});
  return {std::move(y), std::move(hits), std::move(dose)};
}

}  // namespace
}  // namespace cu_fast

CU_FAST_OPERATORS(Device, m) {
  m.impl("delete_latents", TORCH_BOX(&cu_fast::delete_latents<Device>));
}
