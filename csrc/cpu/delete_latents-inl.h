// Deletion of latents from a hidden state that is kept.
//
//   pre_i = score(rho x_t, enc_i) + bias_i         y_t = residual_t + sigma sum_i (new_i - a_i) dec_i
//
//   what          shape                   where it stays
//   x, residual   [T, Din], [T, Dout]     any stride and dtype; read once
//   rho x         [tokens, 3, W] int16    as integers, in scratch: L2 cache (fixed-inl.h)
//   digits, dec   [R, 3, W], [R, Dout]    in place: the rows of a mask's latents alone
//   pre           [tokens, M]             scratch
//   y             [T, Dout]               contiguous, residual's dtype
//
// A block's tokens have one mask.
// 1. List its latents up to the first -1, with factor, bias and max(theta, 0). One that does not exist: NaN.
// 2. Widen the rows of x, multiply by rho, note those that are NaN, make them integers.
// 3. Scores of a tile of latents and all the block's tokens (fixed-inl.h, which says more).
// 4. Per token: compare pre with max(theta, 0), 16 at a time, and with the floor, where it has one; list the
//    latents that fire, each with new - a. None: copy the residual.
// 5. Per vectors of the row: add up the listed rows of dec in registers, multiply by sigma, add the residual,
//    store. The squares that dose needs are added up on the way.
//
// Included inside the namespace and the target region of one instruction set, after fixed-inl.h.

namespace {

// The first n lanes, then zeros.
inline Vec first_lanes(Vec v, int64_t n) {
  if (n >= kLanes) return v;
  float lanes[kLanes];
  v.store(lanes);
  return load_first(lanes, n);
}

struct Scales {
  float rho, sigma;
};

// x [round_up(n, 16)], padded with zeros, becomes rho x.
Scales scale_token(const DeleteLatentsParams& p, float* x) {
  const int64_t n = p.Din;
  float rho = 1, sigma = 1;
  if (p.scale == TokenScale::none) return {rho, sigma};
  Vec sum = Vec::broadcast(0);
  if (p.scale == TokenScale::layer_norm) {
    for (int64_t e = 0; e < n; e += kLanes) sum = sum + Vec::load(x + e);
    const Vec mean = Vec::broadcast(tree_sum_of(sum) / static_cast<float>(n));
    sum = Vec::broadcast(0);
    for (int64_t e = 0; e < n; e += kLanes) {
      const Vec centred = first_lanes(Vec::load(x + e) - mean, n - e);
      sum = sum + centred * centred;
    }
    sigma = std::sqrt(tree_sum_of(sum) / static_cast<float>(n - 1));
    rho = 1.0f / (sigma + kLayerNormEps);
  } else {
    for (int64_t e = 0; e < n; e += kLanes) sum = sum + Vec::load(x + e) * Vec::load(x + e);
    const float length = std::sqrt(tree_sum_of(sum));
    rho = length == 0 ? 0.0f : p.norm / length;
    sigma = length / p.norm;
  }
  const Vec factor = Vec::broadcast(rho);
  for (int64_t e = 0; e < n; e += kLanes) first_lanes(Vec::load(x + e) * factor, n - e).store(x + e);
  return {rho, sigma};
}

// The latents of a mask, each checked: they become addresses.
struct Listed {
  int64_t n = 0;
  bool exist = true;
  const int32_t* ids;
  const float *factor, *bias, *least;
  const float* change;  // [n, 3]
};

Listed list_latents(const DeleteLatentsParams& p, int64_t mask, float* scratch) {
  const LatentScratch at(p);
  auto* const ids = reinterpret_cast<int32_t*>(scratch + at.ids());
  float *const factor = scratch + at.factor(), *const bias = scratch + at.bias(),
               *const least = scratch + at.least();
  Listed listed = {
      .ids = ids, .factor = factor, .bias = bias, .least = least, .change = p.mask_change + mask * p.M * 3};
  for (; listed.n < p.M; ++listed.n) {
    const int32_t id = p.mask_latents[mask * p.M + listed.n];
    if (id < 0) break;
    listed.exist = listed.exist && id < p.R;
    if (!listed.exist) break;
    ids[listed.n] = id;
    factor[listed.n] = p.factor[id];
    bias[listed.n] = p.bias[id];
    const float theta = p.theta[id];
    least[listed.n] = theta > 0 || theta != theta ? theta : 0;  // NaN: never fires
  }
  return listed;
}

// pre of rows of x and the latents [m_begin, m_end) of a list.
void score_rows(const DeleteLatentsParams& p, const Listed& listed, int64_t m_begin, int64_t m_end,
                const FixedRows& x, const float* units, float* pre) {
  const int64_t stride = round_up(p.M, kLanes);
  alignas(64) int64_t sums[kLatentTokens * kTileCodes];
  const int8_t* rows[kTileAddresses];
  for (int64_t m = m_begin; m < m_end; m += kTileCodes) {
    const int64_t n = std::min(kTileCodes, m_end - m);
    for (int64_t j = 0; j < kTileAddresses; ++j)
      rows[j] = p.digits + listed.ids[std::min(m + j, m_end - 1)] * kDigits * x.width;
    sum_tile(x, rows, n, sums);
    for (int64_t t = 0; t < x.tokens; ++t) {
      for (int64_t j = 0; j < n; j += kLanes) {
        const Vec scores =
            scores_of(sums + t * kTileCodes + j, units[t], listed.factor + m + j, listed.bias + m + j, n - j);
        store_first(scores, pre + t * stride + m + j, n - j);
      }
    }
  }
}

// Whether a latent's (pre, id) is not below a token's floor.
inline bool is_kept(const DeleteLatentsParams& p, int64_t token, float pre, int32_t id) {
  if (p.floor_scores == nullptr) return true;
  const float floor = p.floor_scores[token];
  return pre > floor || (pre == floor && id <= p.floor_ids[token]);
}

struct Found {
  int64_t fired, changed;  // fired < 0: a pre is NaN
};

// Lists what changes: the latents that fire, each with new - a; where one that has an idle fires, idle ones too.
Found find_changes(const DeleteLatentsParams& p, const Listed& listed, int64_t token, const float* pre,
                   DecodeSlot* slots) {
  bool hot = false;
  int64_t fired = 0;
  for (int64_t m = 0; m < listed.n; m += kLanes) {
    const int64_t left = listed.n - m;
    const uint32_t lanes = left >= kLanes ? (1u << kLanes) - 1 : (1u << left) - 1;
    const Vec scores = Vec::load(pre + m);
    if ((~Vec::at_least(scores, scores) & lanes) != 0) return {-1, 0};
    uint32_t above = ~Vec::not_below(Vec::load(listed.least + m), scores) & lanes;
    for (; above != 0; above &= above - 1) {
      const int64_t i = m + std::countr_zero(above);
      const float a = pre[i];
      if (!is_kept(p, token, a, listed.ids[i])) continue;
      const float* const change = listed.change + 3 * i;
      hot = hot || change[2] != 0;
      slots[fired++] = {listed.ids[i], (change[0] * a + change[1]) - a};
    }
  }
  if (!hot) return {fired, fired};
  int64_t changed = 0;
  for (int64_t i = 0; i < listed.n; ++i) {
    const float a = pre[i], idle = listed.change[3 * i + 2];
    if (a > listed.least[i] && is_kept(p, token, a, listed.ids[i])) {
      slots[changed++] = {listed.ids[i], (listed.change[3 * i] * a + listed.change[3 * i + 1]) - a};
    } else if (idle != 0) {
      slots[changed++] = {listed.ids[i], idle};
    }
  }
  return {fired, changed};
}

constexpr int64_t kLatentsAhead = 4;  // prefetch distance in rows of dec

// y[d .. d + 16 kRun) of a token, and the squares of what is added and of what it is added to. With kRun = 1 it
// may end at Dout before that.
template <int kRun, class T>
inline void apply_run(const DeleteLatentsParams& p, const T* kept, T* y, const DecodeSlot* slots, int64_t n,
                      float sigma, int64_t d, Vec& moved, Vec& length) {
  const int64_t left = kRun > 1 ? kRun * kLanes : p.Dout - d;  // only a single vector may be cut short
  Vec sum[kRun];
#pragma GCC unroll 16
  for (int v = 0; v < kRun; ++v) sum[v] = Vec::broadcast(0);
  const auto* const dec = static_cast<const float*>(p.dec.data) + d;
  for (int64_t i = 0; i < n; ++i) {
    const float* const row = dec + slots[i].id * p.dec.stride;
    const Vec weight = Vec::broadcast(slots[i].weight);
    if (i + kLatentsAhead < n) {  // prefetch: the hardware cannot guess the next row
      const float* const next = dec + slots[i + kLatentsAhead].id * p.dec.stride;
      for (int v = 0; v < kRun; ++v) __builtin_prefetch(next + v * kLanes);
    }
#pragma GCC unroll 16
    for (int v = 0; v < kRun; ++v) sum[v] = sum[v] + weight * load_first(row + v * kLanes, left - v * kLanes);
  }
#pragma GCC unroll 16
  for (int v = 0; v < kRun; ++v) {
    const int64_t at = d + v * kLanes, here = left - v * kLanes;
    const Vec delta = first_lanes(Vec::broadcast(sigma) * sum[v], here), old = load_first(kept + at, here);
    moved = moved + delta * delta;
    length = length + old * old;
    store_first(old + delta, y + at, here);
  }
}

template <class T>
void apply_token(const DeleteLatentsParams& p, const T* kept, T* y, const DecodeSlot* slots, int64_t n,
                 float sigma, float* dose) {
  constexpr int kRun = 8;
  Vec moved = Vec::broadcast(0), length = Vec::broadcast(0);
  int64_t d = 0;
  for (; d + kRun * kLanes <= p.Dout; d += kRun * kLanes)
    apply_run<kRun>(p, kept, y, slots, n, sigma, d, moved, length);
  for (; d < p.Dout; d += kLanes) apply_run<1>(p, kept, y, slots, n, sigma, d, moved, length);
  *dose = std::sqrt(tree_sum_of(moved)) / std::sqrt(tree_sum_of(length));
}

// Writes the results of a token.
void finish_token(const DeleteLatentsParams& p, const Listed& listed, int64_t token, const float* pre,
                  float sigma, DecodeSlot* slots) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const bool faulty = !listed.exist || !(std::fabs(sigma) <= std::numeric_limits<float>::max());
  const Found found = faulty ? Found{-1, 0} : find_changes(p, listed, token, pre, slots);
  p.hits[token] = static_cast<int32_t>(std::max<int64_t>(found.fired, 0));
  p.dose[token] = found.fired < 0 ? kNan : 0;
  with_row(p.residual, token, [&]<class T>(const T* kept) {
    T* const y = static_cast<T*>(p.y) + token * p.Dout;
    if (found.fired == 0) {
      std::copy_n(kept, p.Dout, y);
    } else if (found.fired > 0) {
      apply_token(p, kept, y, slots, found.changed, sigma, p.dose + token);
    } else {
      T nan;
      narrow(kNan, &nan);
      std::fill_n(y, p.Dout, nan);
    }
  });
}

}  // namespace

void delete_latents(const DeleteLatentsParams& p, const Block& block, LatentStep step, float* scratch,
                    const LatentScores& scores) {
  const LatentScratch at(p);
  const int64_t tokens = block.tokens();
  const Listed listed = list_latents(p, p.mask_row[block.token(0)], scratch);
  if (step != LatentStep::apply) {
    const FixedRows x = {tokens, at.width, reinterpret_cast<int16_t*>(scratch + at.fixed())};
    float* const row = scratch + at.x();
    float units[kLatentTokens];
    for (int64_t t = 0; t < tokens; ++t) {
      const float largest = widen_row(p.x, block.token(t), nullptr, p.Din, row);
      Scales scales = {1, largest};  // NaN if x is not finite
      if (largest == largest) scales = scale_token(p, row);
      units[t] = x.take(t, row, largest * scales.rho);         // rounding keeps order: the largest stays it
      if (block.c_begin == 0) scores.sigma[t] = scales.sigma;  // once, where threads have parts of the list
    }
    if (listed.exist)
      score_rows(p, listed, block.c_begin, std::min(block.c_end, listed.n), x, units, scores.pre);
  }
  if (step == LatentStep::score) return;
  for (int64_t t = 0; t < tokens; ++t)
    finish_token(p, listed, block.token(t), scores.pre + t * at.listed, scores.sigma[t],
                 reinterpret_cast<DecodeSlot*>(scratch + at.slots()));
}
