// Sums of many rows of x and a tile of weights, on the CPU's matrix tiles: the nine products of digits.
//
//   q = 65536 q0 + 256 q1 + q2      p likewise      S = sum over i, j of <q_i, p_j> 2^(8 (4 - i - j))
//
//   what             shape                        layout, and where it stays
//   weights          [16, 3, W] int8              as they lie: the rows of a tile are 16 codes, 3 W apart
//   rows of x        [16, 3, W / 64, 64] int8     Pair's: q0, q1, q2 of 64 columns; L2 cache
//   tiles of x       [W / 64, 3, 16, 16, 4] int8  [64 columns][digit][4 columns][token][column]: L2 cache
//   levels i + j     [5, 16, 16] int32            tiles 0 to 4, [code][token]
//   S                [16, 16] int64               folded per kTileColumns columns, and transposed
//
// The 16 rows of a tile of x lie behind 16 rows of x, one behind each: a row has fixed_words(W) int16, of which Pair's form
// takes 3 W + 8 bytes.
//
// A level has at most three products per column: |sum| <= 3 * 2^14 * 768 < 2^26.
//
// Included inside the namespace and the target region of one instruction set, which supplies Tiles, Levels, Words and Pair, after
// fixed-inl.h. Weights at codes[0], codes[1], ... lie behind each other.

// Columns whose 16 codes stay in the L1 cache while all tokens pass.
inline constexpr int64_t kTileColumns = 768;

inline bool FixedRows::few() const {
  return tokens <= kSingleRows;
}

inline float FixedRows::take(int64_t t, float* x, float largest) const {
  const float unit = fix_row(x, width, largest);
  Pair::cut(x, width, row(t));
  if (few() || (t % kLanes != kLanes - 1 && t != tokens - 1)) return unit;
  int16_t* const first = row(t / kLanes * kLanes);
  for (int64_t i = 0; i < 3 * width / 2; i += 32) {
    Words::transpose(first + i, stride(), first + 3 * width / 2 + 32 + i, stride());
  }
  return unit;
}

// The hot loop: 16 codes, whose digits lie `width` apart, against 16 tokens, `steps` of 64 columns. Reads the cache lines of
// `ahead` meanwhile, 48 per step; null: none.
inline void multiply_levels(const int8_t* codes, int64_t width, const int8_t* tokens, int64_t token_stride,
                            int64_t steps, const int8_t* ahead, int32_t (*levels)[kLanes][kLanes]) {
  const int64_t code_stride = kDigits * width;
  Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>(), Tiles::zero<4>();
  for (int64_t s = 0; s < steps; ++s, codes += 64, tokens += kDigits * 64) {
    // In an order in which two products of one level are at least three apart.
    Tiles::load<5>(codes, code_stride);
    Tiles::load<6>(tokens + 128, token_stride);
    Tiles::add_products<2, 5, 6>();
    Tiles::load<7>(tokens + 64, token_stride);
    Tiles::add_products<1, 5, 7>();
    Tiles::load<6>(tokens, token_stride);
    Tiles::add_products<0, 5, 6>();
    Tiles::load<5>(codes + width, code_stride);
    Tiles::add_products<2, 5, 7>();
    Tiles::load<7>(tokens + 128, token_stride);
    Tiles::add_products<3, 5, 7>();
    Tiles::add_products<1, 5, 6>();
    Tiles::load<5>(codes + 2 * width, code_stride);
    Tiles::add_products<2, 5, 6>();
    Tiles::add_products<4, 5, 7>();
    Tiles::load<6>(tokens + 64, token_stride);
    Tiles::add_products<3, 5, 6>();
    for (int i = 0; ahead != nullptr && i < 48; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
  }
  constexpr int64_t kRow = kLanes * sizeof(int32_t);
  Tiles::store<0>(levels[0], kRow), Tiles::store<1>(levels[1], kRow), Tiles::store<2>(levels[2], kRow);
  Tiles::store<3>(levels[3], kRow), Tiles::store<4>(levels[4], kRow);
}

inline void sum_tile(const FixedRows& x, const int8_t* const* codes, int64_t n, int64_t* sums) {
  const int64_t whole = x.few() ? 0 : n / kLanes * kLanes;
  alignas(64) int32_t levels[5][kLanes][kLanes];
  for (int64_t c = 0; c < whole; c += kLanes) {
    for (int64_t begin = 0; begin < x.width; begin += kTileColumns) {
      const int64_t steps = std::min(kTileColumns, x.width - begin) / 64;
      for (int64_t t = 0; t < x.tokens; t += kLanes) {
        const int8_t* const ahead = codes[c + kTileCodes] + kDigits * kLanes * begin;
        const auto* const tokens =
            reinterpret_cast<const int8_t*>(x.row(t)) + kDigits * (x.width + begin) + 64;
        multiply_levels(codes[c] + begin, x.width, tokens, x.stride() * 2, steps, t == 0 ? ahead : nullptr,
                        levels);
        Levels::fold(levels, begin == 0, sums + t * kTileCodes + c, kTileCodes);
      }
    }
  }
  if (whole < n) sum_pairs(x, codes + whole, n - whole, sums + whole);
}
