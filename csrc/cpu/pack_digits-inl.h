// Rows of weights as integers of 24 bits.
//
//   p = rint(w / s)      s: the smallest fp32 number with kLargest s >= max|w|          core/fixed.h
//
//   what     shape             layout
//   codes    [C, E]            any stride, fp32, bf16 or fp16
//   digits   [C, 3, W] int8    p = 65536 d0 + 256 d1 + d2
//   step     [C] float         s; 0 of a row that counts as zeros, NaN of one with NaN or Inf
//   squares  [C] float         the exact sum of p^2, rounded once
//
// The quotient is a double's, and ties go to even. It is found as a product with 1 / s, which is off by less than
// 2^-28; entries whose product is nearer to a half than that are divided.
//
// Included inside the namespace and the target region of one instruction set, after rows-inl.h.

namespace {

constexpr double kRound = 0x1.8p52;  // x + kRound - kRound: to the nearest integer, ties to even

// s of a row, given its largest magnitude.
float step_of(float largest) {
  if (largest < kLeastRow) return 0;
  const float step = static_cast<float>(double{largest} / kLargest);
  return double{step} * kLargest < double{largest}
             ? std::nextafter(step, std::numeric_limits<float>::infinity())
             : step;
}

// p of 64 entries.
void divide(const float* w, double step, double inverse, double* p) {
  int64_t near_half = 0;
  for (int i = 0; i < 64; ++i) {
    const double quotient = w[i] * inverse;
    p[i] = (quotient + kRound) - kRound;
    near_half += std::fabs(quotient - p[i]) > 0.5 - 0x1p-26 ? 1 : 0;
  }
  if (near_half == 0) return;
  for (int i = 0; i < 64; ++i) p[i] = (w[i] / step + kRound) - kRound;
}

// The sum of p^2 of 64 entries: below 2^52, so that it is exact.
int64_t squares_of(const double* p) {
  double sums[8] = {};
  for (int i = 0; i < 64; i += 8) {
    for (int l = 0; l < 8; ++l) sums[l] += p[i + l] * p[i + l];
  }
  double sum = 0;
  for (double one : sums) sum += one;
  return static_cast<int64_t>(sum);
}

}  // namespace

void pack_digits(const PackParams& p, int64_t c_begin, int64_t c_end, float* row) {
  const int64_t width = digit_width(p.E);
  for (int64_t j = c_begin; j < c_end; ++j) {
    int8_t* const digits = p.digits + j * kDigits * width;
    const float largest = widen_row(p.codes, j, nullptr, p.E, row);
    const float step = largest == largest ? step_of(largest) : largest;
    p.step[j] = step;
    int64_t squares = 0;
    if (!(step > 0)) {
      std::fill_n(digits, kDigits * width, int8_t{0});
    } else {
      const double inverse = 1.0 / step;
      for (int64_t e = 0; e < width; e += 64) {
        double whole[64];
        divide(row + e, step, inverse, whole);
        for (int i = 0; i < 64; ++i) {
          const auto q = static_cast<int32_t>(whole[i]);
          digits[e + i] = static_cast<int8_t>((q + 0x8080) >> 16);
          digits[width + e + i] = static_cast<int8_t>((q + 0x80) >> 8);
          digits[2 * width + e + i] = static_cast<int8_t>(q);
        }
        squares += squares_of(whole);
      }
    }
    p.squares[j] = static_cast<float>(squares);
  }
}
