// Sums of many rows of x and a tile of weights, by products of 16-bit words: Karatsuba's, three in place of nine.
//
//   q = 4096 q1 + q0        p = 4096 p1 + p0        per kChunk columns:
//   A = <q1, p1>   B = <q0, p0>   M = <q1 + q0, p1 + p0>     S += A 2^24 + (M - A - B) 2^12 + B
//
//   what             shape                            layout, and where it stays
//   rows of x        [tokens, 3, W] int16             q1, q0, q1 + q0; fixed_words(W) apart: L2 cache
//   tile of weights  [kTileCodes, kChunk, 2] int16    [code / 16][column / 2][p1, p0][code % 16][column % 2]: L1
//   products         [kTokens, kGroups, 3, 16] int32  registers
//
// A tile of weights is cut and transposed once for all tokens of the block.
//
// |q1|, |p1| <= 2040, |q0| <= 2048 and |p0| <= 2176: A, B and M - A - B of up to 249 columns fit an int32. M may
// wrap: the difference is right all the same.
//
// Included inside the namespace and the target region of one instruction set, which supplies Words and Ints, after
// fixed-inl.h.

constexpr int64_t kChunk = 192;

// A row of integers as the words that the tile takes.
inline void cut_words(const float* q, int64_t width, int16_t* words) {
  for (int64_t e = 0; e < width; ++e) {
    const int32_t whole = static_cast<int32_t>(q[e]);
    const int32_t high = (whole + 2048) >> 12, low = whole - (high << 12);
    words[e] = static_cast<int16_t>(high);
    words[width + e] = static_cast<int16_t>(low);
    words[2 * width + e] = static_cast<int16_t>(high + low);
  }
}

inline bool FixedRows::few() const {
  return tokens <= Pair::kFewTokens;
}

inline float FixedRows::take(int64_t t, float* x, float largest) const {
  const float unit = fix_row(x, width, largest);
  if (few()) {
    Pair::cut(x, width, row(t));
  } else {
    cut_words(x, width, row(t));
  }
  return unit;
}

// Columns [begin, begin + n) of 16 rows of weights, for one group of a tile. n is a multiple of 64.
inline void cut_group(const int8_t* const* codes, int64_t width, int64_t begin, int64_t n, int16_t* to) {
  alignas(64) int16_t high[kLanes][64], low[kLanes][64];
  for (int64_t e = begin; e < begin + n; e += 64) {
    for (int c = 0; c < kLanes; ++c) {
      const int8_t *const d0 = codes[c] + e, *const d1 = d0 + width, *const d2 = d1 + width;
      for (int d = 0; d < kDigits; ++d) __builtin_prefetch(codes[c + kTileCodes] + d * width + e, 0, 2);
      for (int i = 0; i < 64; ++i) {
        const int upper = (d1[i] + 8) >> 4;
        high[c][i] = static_cast<int16_t>(16 * d0[i] + upper);
        low[c][i] = static_cast<int16_t>(256 * (d1[i] - 16 * upper) + d2[i]);
      }
    }
    for (int half = 0; half < 2; ++half, to += kLanes * 4 * kLanes) {
      Words::transpose(high[0] + half * 32, 64, to, 4 * kLanes);
      Words::transpose(low[0] + half * 32, 64, to + 2 * kLanes, 4 * kLanes);
    }
  }
}

// The hot loop: kTokens rows of x against 16 kGroups codes, `pairs` pairs of columns.
template <int kTokens, int kGroups>
[[gnu::noinline]] void multiply(const int16_t* x, int64_t width, const int16_t* tile, int64_t pairs,
                                bool first, int64_t* sums) {
  const int64_t stride = fixed_words(width);
  Ints high[kTokens][kGroups], low[kTokens][kGroups], both[kTokens][kGroups];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) high[t][g] = low[t][g] = both[t][g] = Ints::broadcast(0);
  }
  // Every row of x times the words p: those of q1, of q0 or of their sum. Inlined, so that the sums stay in registers.
  const auto add = [&](Ints(&sums)[kTokens][kGroups], const Words(&p)[kGroups], const int16_t* q) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const Words two = Words::repeat(q + t * stride);
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) sums[t][g].add_products(p[g], two);
    }
  };
  for (int64_t i = 0; i < pairs; ++i, tile += 4 * kLanes, x += 2) {
    const auto words = [&](int g, int part) {
      return Words::load(tile + g * kChunk * 2 * kLanes + part * 2 * kLanes);
    };
    Words p[kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) p[g] = words(g, 0);
    add(high, p, x);
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) p[g] = words(g, 1);
    add(low, p, x + width);
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) p[g] = p[g] + words(g, 0);
    add(both, p, x + 2 * width);
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g)
      Ints::fold(high[t][g], low[t][g], both[t][g], first, sums + t * kTileCodes + g * kLanes);
  }
}

inline void sum_tile(const FixedRows& x, const int8_t* const* codes, int64_t n, int64_t* sums) {
  if (x.few()) {
    return sum_pairs(x, codes, n, sums);
  }
  constexpr int kTokens = Ints::kTileTokens, kGroups = Ints::kTileGroups;
  alignas(64) int16_t tile[kTileCodes * kChunk * 2];
  for (int64_t begin = 0; begin < x.width; begin += kChunk) {
    const int64_t columns = std::min(kChunk, x.width - begin);
    for (int64_t c = 0; c < n; c += kLanes)
      cut_group(codes + c, x.width, begin, columns, tile + c * kChunk * 2);
    const auto multiply_groups = [&]<int kOf>(int64_t c) {
      const auto run = [&]<int kRows>(int64_t t) {
        multiply<kRows, kOf>(x.row(t) + begin, x.width, tile + c * kChunk * 2, columns / 2, begin == 0,
                             sums + t * kTileCodes + c);
      };
      int64_t t = 0;
      for (; t + kTokens <= x.tokens; t += kTokens) run.template operator()<kTokens>(t);
      for (; t < x.tokens; ++t) run.template operator()<1>(t);
    };
    int64_t c = 0;
    for (; c + (kGroups - 1) * kLanes < n; c += kGroups * kLanes)
      multiply_groups.template operator()<kGroups>(c);
    for (; c < n; c += kLanes) multiply_groups.template operator()<1>(c);
  }
}
