// The dense encoder.
//
//   out[t, j] = act((<q_t, p_j> unit_t) factor_j [+ bias_j])     act: none, or ReLU, which keeps NaN
//
//   what       shape            layout
//   x          [T, D]           any stride, fp32, bf16 or fp16; q of x_t - pre
//   digits     [E, 3, W]        core/fixed.h
//   out        [T, E] fp32      contiguous
//
// visit_sums computes the integers. The unit of a row of x - pre that holds NaN or Inf is NaN, and so are its
// scores.
//
// Included inside the namespace and the target region of one instruction set, which supplies Vec.

void sae_encode(const EncodeParams& p, const Block& block, float* scratch) {
  visit_sums(
      p.score, block, scratch, [](int64_t, bool) {},
      [&](int64_t token, float unit, int64_t first, int64_t n, const int64_t* sums) {
        float* const out = p.out + token * p.score.C + first;
        for (int64_t j = 0; j < n; j += kLanes) {
          const int64_t at = first + j;
          Vec z = scores_of(sums + j, unit, p.score.factor + at,
                            p.score.bias == nullptr ? nullptr : p.score.bias + at, n - j);
          if (p.relu) z = z.relu();
          store_first(z, out + j, n - j);
        }
      });
}
