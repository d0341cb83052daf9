// Packs the scan plane of a codebook (core/scan.h). It runs once per codebook, so it is plain C++.
//
//   p_j = mean + d_j        c_j = round(d_j / step_j)        step_j = max(largest |d_j| / 127, 1)
//
// 1. The mean of the codes, in double; kept only if it takes away a tenth of their squared norm.
// 2. Each code minus the mean, scaled and rounded to nearest; norms in double, rounded up to fp32.

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "core/fixed.h"
#include "core/scan.h"
#include "arguments.h"
#include "cpu/grid.h"
#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "registration.h"

namespace cu_fast {
namespace {

// A code's integers, which fp32 holds exactly.
void read_code(const int8_t* digits, int64_t E, float* to) {
  const int64_t W = digit_width(E);
  for (int64_t e = 0; e < E; ++e)
    to[e] = static_cast<float>(65536 * digits[e] + 256 * digits[W + e] + digits[2 * W + e]);
}

double squared_norm(const float* x, int64_t E) {
  double lanes[8] = {};
  for (int64_t e = 0; e < E; ++e) lanes[e % 8] += double{x[e]} * x[e];
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

// A float above x. 1e-9 covers the rounding of the doubles that x comes from.
float rounded_up(double x) {
  return std::nextafter(static_cast<float>(x * (1 + 1e-9)), std::numeric_limits<float>::infinity());
}

bool has_bound(float factor) {
  return factor == 0 || (std::abs(factor) >= kLeastFactor && std::abs(factor) <= kMostFactor);
}

struct Packing {
  const int8_t* digits;  // [C, 3, W]
  const float* factor;   // [C]
  int64_t C, E;
  uint8_t* plane;
  float* terms;
  float* mean;  // [E]

  // Adds the codes among [begin, end) whose error has a bound to sum [E]. Returns the sum of their squared norms, and
  // how many there are.
  std::pair<double, int64_t> add_codes(int64_t begin, int64_t end, float* code, double* sum) const {
    double squares = 0;
    int64_t n = 0;
    for (int64_t j = begin; j < end; ++j) {
      if (!has_bound(factor[j])) continue;
      read_code(digits + j * kDigits * digit_width(E), E, code);
      for (int64_t e = 0; e < E; ++e) sum[e] += code[e];
      squares += squared_norm(code, E);
      ++n;
    }
    return {squares, n};
  }

  // Writes the bytes and terms of one group. `code` is scratch, [E]; `mean_norm` is 0 if there is no mean.
  void pack_group(int64_t g, double mean_norm, float* code) const {
    const int64_t steps = scan_width(E) / 4;
    uint8_t* const bytes = plane + g * steps * 4 * kScanGroup;
    float* const term = terms + g * kTermsOfGroup;
    float* const largest = term + 3 * kScanGroup;
    std::fill_n(bytes, steps * 4 * kScanGroup, uint8_t{kOffset});
    std::fill_n(term, kTermsOfGroup, 0.0f);

    for (int64_t i = 0; i < kScanGroup && g * kScanGroup + i < C; ++i) {
      const int64_t j = g * kScanGroup + i;
      if (!has_bound(factor[j])) {
        term[kResidual * kScanGroup + i] = largest[kResidual] = std::numeric_limits<float>::infinity();
        continue;
      }
      const double scale = std::abs(factor[j]);
      read_code(digits + j * kDigits * digit_width(E), E, code);
      const double norm = std::sqrt(squared_norm(code, E));
      const auto d = [&](int64_t e) { return mean_norm == 0 ? double{code[e]} : double{code[e]} - mean[e]; };
      double most = 0;
      for (int64_t e = 0; e < E; ++e) most = std::max(most, std::abs(d(e)));
      const double step = std::max(most / 127, 1.0);
      double residual = 0, size = 0;
      for (int64_t e = 0; e < E; ++e) {
        const double c = std::nearbyint(d(e) / step), miss = d(e) - step * c;
        bytes[(e / 4 * kScanGroup + i) * 4 + e % 4] = static_cast<uint8_t>(static_cast<int>(c) + kOffset);
        residual += miss * miss;
        size += c * c;
      }
      size = std::sqrt(size) * step;
      // A negative factor reverses the order: the scale keeps its sign, the bounds use its magnitude.
      const float values[] = {static_cast<float>(double{factor[j]} * step),
                              rounded_up(std::sqrt(residual) * scale), rounded_up(size * scale),
                              rounded_up((norm + mean_norm + 2 * size) * scale)};
      for (int t : {kScale, kResidual, kSize}) term[t * kScanGroup + i] = values[t];
      for (int t : {kScale, kResidual, kSize, kMagnitude})
        largest[t] = std::max(largest[t], std::abs(values[t]));
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> pack_scan(const Tensor& digits_in, const Tensor& factor_in, int64_t E) {
  check(E >= 0, "E is ", E, ", must not be negative");
  const Tensor digits = digits_argument("digits", digits_in, "[C, 3, round_up(E, 64)]", E);
  const int64_t C = digits.size(0);
  check_shape("factor", factor_in, "[C]", {C});
  check_dtype("factor", factor_in, ScalarType::Float);
  const Tensor factor = torch::stable::contiguous(factor_in);
  const int64_t G = scan_groups(C);
  Tensor plane = on_huge_pages(new_tensor({G, scan_width(E) / 4, kScanGroup, 4}, ScalarType::Byte));
  Tensor terms = new_tensor({G, kTermsOfGroup}, ScalarType::Float);
  std::vector<float> mean(E, 0.0f);
  const Packing p{digits.const_data_ptr<int8_t>(),
                  factor.const_data_ptr<float>(),
                  C,
                  E,
                  static_cast<uint8_t*>(plane.mutable_data_ptr()),
                  terms.mutable_data_ptr<float>(),
                  mean.data()};

  // Partial sums over chunks of fixed size, added in order, so that the plane does not depend on the threads.
  constexpr int64_t kChunk = 4096;
  const int64_t chunks = (C + kChunk - 1) / kChunk;
  const int64_t workers = std::clamp<int64_t>(C * E / kMinWork, 1, torch::stable::get_num_threads());
  std::vector<double> sums(chunks * E, 0.0), squares(chunks);
  std::vector<int64_t> counts(chunks);
  parallel(std::min(workers, chunks), chunks, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> code(E);
    for (int64_t i = begin; i < end; ++i) {
      std::tie(squares[i], counts[i]) =
          p.add_codes(i * kChunk, std::min(C, (i + 1) * kChunk), code.data(), sums.data() + i * E);
    }
  });
  double square = 0, count = 0, mean_square = 0;
  for (int64_t i = 0; i < chunks; ++i) square += squares[i], count += counts[i];
  for (int64_t e = 0; e < E && count > 0; ++e) {
    double sum = 0;
    for (int64_t i = 0; i < chunks; ++i) sum += sums[i * E + e];
    mean[e] = static_cast<float>(sum / count);
    mean_square += double{mean[e]} * mean[e];
  }
  const bool centred = mean_square * count > 0.1 * square;
  const double mean_norm = centred ? std::sqrt(mean_square) : 0.0;
  parallel(std::min(workers, G), G, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> code(E);
    for (int64_t g = begin; g < end; ++g) p.pack_group(g, mean_norm, code.data());
  });
  Tensor scan_mean = new_tensor({E}, ScalarType::Float);
  std::transform(mean.begin(), mean.end(), scan_mean.mutable_data_ptr<float>(),
                 [&](float x) { return centred ? x : 0.0f; });
  return {plane, terms, scan_mean};
}

}  // namespace
}  // namespace cu_fast

STABLE_TORCH_LIBRARY_IMPL(cu_fast, CPU, m) {
  m.impl("pack_scan", TORCH_BOX(&cu_fast::pack_scan));
}
