// The dense encoder.
//
//   out[t, j] = act(canonical(x_t - pre, W_enc_j) [+ bias_j])     act: none, or ReLU, which keeps NaN
//
//   what       shape            layout
//   x, W_enc   [T, D], [E, D]   any stride, fp32, bf16 or fp16
//   out        [T, E] fp32      contiguous
//
// visit_dots computes the dot products. A row of x - pre that holds NaN or Inf gives a row of NaN.
//
// Included inside the namespace and the target region of one instruction set, which supplies Vec.

void sae_encode(const EncodeParams& p, const Block& block, float* scratch) {
  bool finite[kBlockTokens];
  visit_dots(
      p.score, block, scratch,
      [&](int64_t token, bool row_is_finite) { finite[token - block.t_begin] = row_is_finite; },
      [&](int64_t token, int64_t first, int64_t n, const float* dots) {
        float* const out = p.out + token * p.score.C + first;
        if (!finite[token - block.t_begin]) {
          std::fill_n(out, n, std::numeric_limits<float>::quiet_NaN());
          return;
        }
        for (int64_t j = 0; j < n; j += kLanes) {
          Vec z = Vec::load(dots + j);
          if (p.bias != nullptr) z = z + load_first(p.bias + first + j, n - j);
          if (p.relu) z = z.relu();
          store_first(z, out + j, n - j);
        }
      });
}
