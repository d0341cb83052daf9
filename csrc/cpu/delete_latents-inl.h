// Deletion of latents from a hidden state that is kept.
//
//   pre_i = canonical(enc_i, rho x_t) + bias_i     y_t = residual_t + sigma sum_i (new_i - a_i) dec_i
//
//   what          shape                   where it stays
//   x, residual   [T, Din], [T, Dout]     any stride and dtype; read once
//   rho x         [tokens, Din]           fp32 in scratch: L2 cache
//   enc, dec      [R, Din], [R, Dout]     in place: the rows of a mask's latents alone
//   pre           [tokens, M]             scratch
//   partials      [kTokens, kRows, 16]    registers
//   y             [T, Dout]               contiguous, residual's dtype
//
// A block's tokens have one mask.
// 1. List its latents up to the first -1, with bias and max(theta, 0). One that does not exist: NaN.
// 2. Widen the rows of x, multiply by rho, note those that are NaN.
// 3. Dot products of a tile of latents and all the block's tokens, kRows x kTokens at a time: kChunk columns
//    of the tile stay in the L1 cache, partials between chunks likewise.
// 4. Per token: compare pre with max(theta, 0), 16 at a time, and with the floor, where it has one; list the
//    latents that fire, each with new - a. None: copy the residual.
// 5. Per vectors of the row: add up the listed rows of dec in registers, multiply by sigma, add the residual,
//    store. The squares that dose needs are added up on the way.
//
// Included inside the namespace and the target region of one instruction set, which supplies Vec.

namespace {

// The first n lanes, then zeros.
inline Vec first_lanes(Vec v, int64_t n) {
  if (n >= kLanes) return v;
  float lanes[kLanes];
  v.store(lanes);
  return load_first(lanes, n);
}

inline float tree_sum_of(Vec v) {
  const Vec one[1] = {v};
  float sum;
  Vec::tree_sums(one, &sum);
  return sum;
}

// x [round_up(n, 16)], padded with zeros, becomes rho x. Returns sigma.
float scale_token(const DeleteLatentsParams& p, float* x) {
  const int64_t n = p.Din;
  float rho = 1, sigma = 1;
  if (p.scale == TokenScale::none) return sigma;
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
  return sigma;
}

// The latents of a mask, each checked: they become addresses.
struct Listed {
  int64_t n = 0;
  bool exist = true;
  const int32_t* ids;
  const float *bias, *least;
  const float* change;  // [n, 3]
};

Listed list_latents(const DeleteLatentsParams& p, int64_t mask, float* scratch) {
  const LatentScratch at(p);
  auto* const ids = reinterpret_cast<int32_t*>(scratch + at.ids());
  float *const bias = scratch + at.bias(), *const least = scratch + at.least();
  Listed listed = {.ids = ids, .bias = bias, .least = least, .change = p.mask_change + mask * p.M * 3};
  for (; listed.n < p.M; ++listed.n) {
    const int32_t id = p.mask_latents[mask * p.M + listed.n];
    if (id < 0) break;
    listed.exist = listed.exist && id < p.R;
    if (!listed.exist) break;
    ids[listed.n] = id;
    bias[listed.n] = p.bias[id];
    const float theta = p.theta[id];
    least[listed.n] = theta > 0 || theta != theta ? theta : 0;  // NaN: never fires
  }
  return listed;
}

// Columns that are multiplied at a time: those of a tile of latents stay in the L1 cache for all tokens.
constexpr int64_t kChunk = 512;

// partial[t][r] += x[t] * rows[r] from `begin` to `end`, of kTokens rows of x, padded with zeros, and kRows rows
// of enc.
template <int kTokens, int kRows>
[[gnu::noinline]] void add_products(const float* x, int64_t x_stride, const float* const* rows, int64_t begin,
                                    int64_t end, float* partials) {
  const float* row[kRows];
  Vec partial[kTokens][kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    row[r] = rows[r];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      partial[t][r] = begin == 0 ? Vec::broadcast(0) : Vec::load(partials + (t * kRows + r) * kLanes);
  }
  int64_t e = begin;
  for (; e + kLanes <= end; e += kLanes) {
    Vec token[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) token[t] = Vec::load(x + t * x_stride + e);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec latent = Vec::load(row[r] + e).in_register();
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) partial[t][r] = partial[t][r] + token[t] * latent;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (e < end) {
      const Vec latent = load_first(row[r] + e, end - e);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        partial[t][r] = partial[t][r] + Vec::load(x + t * x_stride + e) * latent;
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) partial[t][r].store(partials + (t * kRows + r) * kLanes);
  }
}

// The same of `tokens` rows, kTokens at a time.
template <int kTokens, int kRows>
void add_products_of(int64_t tokens, const float* x, int64_t x_stride, const float* const* rows,
                     int64_t begin, int64_t end, float* partials) {
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens)
    add_products<kTokens, kRows>(x + t * x_stride, x_stride, rows, begin, end, partials + t * kRows * kLanes);
  if constexpr (kTokens > 1) {
    if (t < tokens)
      add_products_of<kTokens - 1, kRows>(tokens - t, x + t * x_stride, x_stride, rows, begin, end,
                                          partials + t * kRows * kLanes);
  }
}

// pre[t * stride + r] of `tokens` rows of x and the first n of kRows latents; a tile that is not full repeats the
// last.
template <int kRows>
void score_tile(const DeleteLatentsParams& p, const int32_t* ids, int64_t n, const float* x, int64_t tokens,
                float* pre) {
  constexpr int kTokens = Vec::kDeepTokens;
  const int64_t width = round_up(p.Din, kLanes), stride = round_up(p.M, kLanes);
  const float* rows[kRows];
  for (int64_t r = 0; r < kRows; ++r)
    rows[r] = static_cast<const float*>(p.enc.data) + ids[std::min(r, n - 1)] * p.enc.stride;
  alignas(64) float partials[kLatentTokens * kRows * kLanes];
  const int64_t chunk = tokens > kTokens ? kChunk : p.Din;
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + chunk, p.Din);
    add_products_of<kTokens, kRows>(tokens, x, width, rows, begin, end, partials);
    begin = end;
  } while (begin < p.Din);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < n; ++r)
      pre[t * stride + r] = tree_sum_of(Vec::load(partials + (t * kRows + r) * kLanes));
  }
}

// pre of `tokens` rows of x and the latents [m_begin, m_end) of a list.
void score_rows(const DeleteLatentsParams& p, const Listed& listed, int64_t m_begin, int64_t m_end,
                const float* x, int64_t tokens, float* pre) {
  constexpr int kRows = Vec::kDeepCodes, kHalf = (kRows + 1) / 2;
  for (int64_t m = m_begin, n; m < m_end; m += n) {
    const int64_t left = m_end - m;
    const int32_t* const ids = listed.ids + m;
    n = std::min<int64_t>(left, kRows);
    const auto score = left > kHalf ? score_tile<kRows> : left > 1 ? score_tile<kHalf> : score_tile<1>;
    score(p, ids, n, x, tokens, pre + m);
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
Found find_changes(const DeleteLatentsParams& p, const Listed& listed, int64_t token, float* pre,
                   DecodeSlot* slots) {
  bool hot = false;
  int64_t fired = 0;
  for (int64_t m = 0; m < listed.n; m += kLanes) {
    const int64_t left = listed.n - m;
    const uint32_t lanes = left >= kLanes ? (1u << kLanes) - 1 : (1u << left) - 1;
    const Vec scores = Vec::load(pre + m) + Vec::load(listed.bias + m);
    if ((~Vec::at_least(scores, scores) & lanes) != 0) return {-1, 0};
    scores.store(pre + m);
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
void finish_token(const DeleteLatentsParams& p, const Listed& listed, int64_t token, float* pre, float sigma,
                  DecodeSlot* slots) {
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
    for (int64_t t = 0; t < tokens; ++t) {
      float* const x = scratch + at.x() + t * at.width;
      const bool finite = widen_row(p.x, block.token(t), nullptr, p.Din, x);
      const float sigma = finite ? scale_token(p, x) : std::numeric_limits<float>::quiet_NaN();
      if (block.c_begin == 0) scores.sigma[t] = sigma;  // once, where several threads have parts of the list
    }
    if (listed.exist)
      score_rows(p, listed, block.c_begin, std::min(block.c_end, listed.n), scratch + at.x(), tokens,
                 scores.pre);
  }
  if (step == LatentStep::score) return;
  for (int64_t t = 0; t < tokens; ++t)
    finish_token(p, listed, block.token(t), scores.pre + t * at.listed, scores.sigma[t],
                 reinterpret_cast<DecodeSlot*>(scratch + at.slots()));
}
