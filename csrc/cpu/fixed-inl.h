// Integer sums of a block's rows of x and rows of weights, tile by tile, and their scores.
//
//   S[t][j] = <q_t, p_j>      score = ((fp32(S) unit_t) factor_j) + bias_j           defined in core/fixed.h
//
//   what             shape                      where it stays
//   rows of x        [tokens, fixed_words(W)]   integers, laid out as their sums are computed: L2 cache
//   S                [tokens, kTileCodes] int64 L1 cache
//
// 1. Widen the block's rows, subtract pre, note those that hold NaN or Inf, make them integers.
// 2. Sum. Few tokens: Pair of the instruction set, rows of weights as they lie, columns in lanes. Many: tile by tile, by
//    words (fixed_words-inl.h) or by the CPU's own tiles (fixed_tiles-inl.h), which define the functions declared here.
// 3. Pass each row of sums to the operator, which selects or stores. The [T, C] matrix never exists.
//
// Included inside the namespace and the target region of one instruction set, which supplies Vec, Pair and Tiles, after
// rows-inl.h and before one of those two.

// A row of round_up(E, 64) entries becomes integers, as floats still. Returns its unit. `largest` is the row's; if
// that is not finite, all become 0 and the unit is NaN, as the row's scores are.
inline float fix_row(float* x, int64_t width, float largest) {
  if (!(largest <= std::numeric_limits<float>::max())) {
    std::fill_n(x, width, 0.0f);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const int a = shift_of(largest);
  const Vec scale = Vec::broadcast(power_of_two(a));
  for (int64_t e = 0; e < width; e += kLanes) (Vec::load(x + e) * scale).nearest().store(x + e);
  return power_of_two(-a);
}

// The rows of a block of tokens.
struct FixedRows {
  int64_t tokens, width;
  int16_t* data;  // [tokens, stride()]

  int64_t stride() const { return fixed_words(width); }
  int16_t* row(int64_t t) const { return data + t * stride(); }
  // Whether Pair sums them, one by one.
  inline bool few() const;
  // x [width] is overwritten. Returns the row's unit. Rows are taken in order.
  inline float take(int64_t t, float* x, float largest) const;
};

// sums[t][j], [tokens, kTileCodes], of rows of x and n <= kTileCodes rows of weights. `codes` has kTileAddresses
// addresses, whatever n is.
inline void sum_tile(const FixedRows& x, const int8_t* const* codes, int64_t n, int64_t* sums);

// Addresses of codes come with those of the tile after, for prefetching: the hardware does not guess what is read
// next if rows are short, or if several rows of x take turns with one.
inline constexpr int64_t kTileAddresses = 2 * kTileCodes;

// The sums of few rows of x, and codes as they lie: four pairs at a time, all rows of x with one code after another.
inline void sum_pairs(const FixedRows& x, const int8_t* const* codes, int64_t n, int64_t* sums) {
  const int16_t* rows[4];
  const int8_t* of[4];
  constexpr int64_t kAhead = 4, kLong = 1024;
  const int64_t prefetched = x.tokens > 1 || x.width <= kLong ? kDigits * x.width : 0;
  int64_t t = 0, j = 0;
  while (j < n) {
    int64_t place[4], dots[4];
    for (int i = 0; i < 4; ++i) {  // beyond the last pair: the address of some code
      for (int64_t at = 0; t == 0 && at < prefetched; at += 64) __builtin_prefetch(codes[j + kAhead] + at);
      rows[i] = x.row(t), of[i] = codes[std::min(j, n - 1)], place[i] = j < n ? t * kTileCodes + j : -1;
      if (++t == x.tokens) t = 0, ++j;
    }
    Pair::dots(rows, of, x.width, dots);
    for (int i = 0; i < 4 && place[i] >= 0; ++i) sums[place[i]] = dots[i];
  }
}

// The scores of 16 sums, of which the first n are of codes: factor and bias (null: zero) are theirs.
inline Vec scores_of(const int64_t* sums, float unit, const float* factor, const float* bias, int64_t n) {
  const Vec score = (Vec::load(sums) * Vec::broadcast(unit) * load_first(factor, n)).cut();
  return bias == nullptr ? score : (score + load_first(bias, n)).cut();
}

// Calls start(token, whether the row is finite) for each token of the block, then, for each token and tile of codes,
// visit(token, the row's unit, first code, codes, sums).
template <class Start, class Visit>
inline void visit_sums(const ScoreParams& p, const Block& block, float* scratch, Start start, Visit visit) {
  const int64_t tokens = block.tokens(), width = digit_width(p.E);
  const FixedRows x = {tokens, width, reinterpret_cast<int16_t*>(scratch + width)};
  float units[kBlockTokens];
  for (int64_t t = 0; t < tokens; ++t) {
    const float largest = widen_row(p.z, block.token(t), p.pre, p.E, scratch);
    start(block.token(t), largest == largest);
    units[t] = x.take(t, scratch, largest);
  }

  [[maybe_unused]] const Tiles tiles;
  alignas(64) int64_t sums[kBlockTokens * kTileCodes];
  const int8_t* codes[kTileAddresses];
  for (int64_t first = block.c_begin; first < block.c_end; first += kTileCodes) {
    const int64_t n = std::min(kTileCodes, block.c_end - first);
    for (int64_t j = 0; j < kTileAddresses; ++j) codes[j] = p.code(std::min(first + j, block.c_end - 1));
    sum_tile(x, codes, n, sums);
    for (int64_t t = 0; t < tokens; ++t) visit(block.token(t), units[t], first, n, sums + t * kTileCodes);
  }
}
