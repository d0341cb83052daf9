// Canonical dot products of a block's tokens and codes, tile by tile.
//
//   dots[t][j] = canonical(z_t - pre, codes_j)          defined in core/canonical.h
//
//   what           shape                            where it stays
//   rows of z      [kBlockTokens, round_up(E, 16)]  fp32 in scratch, widened once per block
//   tile of codes  [tile_codes(E), E]               in place, or fp32 in scratch: L2 cache
//   partials       [kTokens, kCodes, 16]            registers
//   dots           [kTokens, kMaxTileCodes]         L1 cache
//
// 1. Widen the block's rows of z, subtract pre, note the rows that hold NaN or Inf.
// 2. For each tile of codes and each kTokens rows of z: fill dots, kTokens x kCodes at a time. With few
//    tokens the codes go one by one: memory is then read as one stream, which the hardware prefetches best.
// 3. Pass each row of dots to the operator, which selects or stores. The [T, C] matrix never exists.
//
// Included inside the namespace and the target region of one instruction set, which supplies Vec.

// The first n <= kLanes elements, then zeros.
template <class T>
inline Vec load_first(const T* from, int64_t n) {
  if (n >= kLanes) return Vec::load(from);
  T padded[kLanes] = {};
  std::copy_n(from, n, padded);
  return Vec::load(padded);
}

template <class T>
inline void store_first(Vec v, T* to, int64_t n) {
  if (n >= kLanes) return v.store(to);
  T padded[kLanes];
  v.store(padded);
  std::copy_n(padded, n, to);
}

// Calls use(pointer to element (row, 0)), with a pointer to the matrix's element type.
template <class Use>
inline void with_row(const Matrix& m, int64_t row, Use use) {
  const int64_t offset = row * m.stride;
  switch (m.dtype) {
    case Dtype::f32:
      return use(static_cast<const float*>(m.data) + offset);
    case Dtype::bf16:
      return use(static_cast<const Bf16*>(m.data) + offset);
    case Dtype::f16:
      return use(static_cast<const Half*>(m.data) + offset);
  }
}

// to[0, round_up(n, 16)) = row of m - minus (null: zero), padded with zeros. Returns whether all values are
// finite.
inline bool widen_row(const Matrix& m, int64_t row, const float* minus, int64_t n, float* to) {
  const Vec none = Vec::broadcast(0);
  Vec faults[4] = {none, none, none,
                   none};  // x - x is 0, or NaN if x is not finite; one sum would be waited for
  with_row(m, row, [&](const auto* from) {
    for (int64_t i = 0; i < n; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int64_t at = i + v * kLanes;
        if (at >= n) break;
        Vec x = load_first(from + at, n - at);
        if (minus != nullptr) x = x - load_first(minus + at, n - at);
        faults[v] = faults[v] + (x - x);
        x.store(to + at);
      }
    }
  });
  const Vec sum = (faults[0] + faults[1]) + (faults[2] + faults[3]);
  return Vec::at_least(sum, sum) == (1u << kLanes) - 1;
}

// The hot loop: kTokens rows of z against kCodes codes, `stride` apart. E is a multiple of 16.
template <int kTokens, int kCodes, class T>
[[gnu::noinline]] void dot_tile(const float* z, int64_t z_stride, const T* codes, int64_t stride, int64_t E,
                                float* dots) {
  Vec partial[kTokens][kCodes];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int c = 0; c < kCodes; ++c) partial[t][c] = Vec::broadcast(0);
  }
  for (int64_t e = 0; e < E; e += kLanes) {
    Vec code[kCodes];
#pragma GCC unroll 4
    for (int c = 0; c < kCodes; ++c) code[c] = Vec::load(codes + c * stride + e);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const Vec row = Vec::load(z + t * z_stride + e);
#pragma GCC unroll 4
      for (int c = 0; c < kCodes; ++c) partial[t][c] = partial[t][c] + row * code[c];
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) Vec::tree_sums(partial[t], dots + t * kMaxTileCodes);
}

// dots[i] of row z[i] and code[i], four independent pairs.
template <class T>
[[gnu::noinline]] void dot_pairs(const float* const (&z)[4], const T* const (&code)[4], int64_t E,
                                 float* dots) {
  Vec partial[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) partial[i] = Vec::broadcast(0);
  for (int64_t e = 0; e < E; e += kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) partial[i] = partial[i] + Vec::load(z[i] + e) * Vec::load(code[i] + e);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec one[1] = {partial[i]};
    Vec::tree_sums(one, dots + i);
  }
}

// dots[t][j] of kTokens rows and n codes: kCodes codes at a time, the rest one by one.
template <int kTokens, int kCodes, class T>
inline void score_rows(const float* z, int64_t z_stride, const T* codes, int64_t stride, int64_t n, int64_t E,
                       float* dots) {
  int64_t j = 0;
  for (; j + kCodes <= n; j += kCodes) {
    dot_tile<kTokens, kCodes>(z, z_stride, codes + j * stride, stride, E, dots + j);
  }
  for (; j < n; ++j) dot_tile<kTokens, 1>(z, z_stride, codes + j * stride, stride, E, dots + j);
}

// The same for `rows` rows, which is kTokens or 1.
template <class T>
inline void score_tile(int64_t rows, bool one_by_one, const float* z, int64_t z_stride, const T* codes,
                       int64_t stride, int64_t n, int64_t E, float* dots) {
  if (rows == 1) {
    score_rows<1, 1>(z, z_stride, codes, stride, n, E, dots);
  } else if (one_by_one) {
    score_rows<Vec::kTokens, 1>(z, z_stride, codes, stride, n, E, dots);
  } else {
    score_rows<Vec::kTokens, Vec::kCodes>(z, z_stride, codes, stride, n, E, dots);
  }
}

// Codes [first, first + n) as a matrix: in place, or widened into scratch.
inline Matrix codes_of_tile(const ScoreParams& p, int64_t first, int64_t n, float* widened) {
  if (reads_codes_in_place(p)) return p.codes.from_row(first);
  const int64_t stride = round_up(p.E, kLanes);
  for (int64_t j = 0; j < n; ++j) widen_row(p.codes, first + j, nullptr, p.E, widened + j * stride);
  return {widened, stride, Dtype::f32};
}

// Calls start(token, whether the row is finite) for each token of the block, then, for each token and tile of
// codes, visit(token, first code, codes, dots).
template <class Start, class Visit>
inline void visit_dots(const ScoreParams& p, const Block& block, float* scratch, Start start, Visit visit) {
  static_assert(kMaxTileCodes % kLanes == 0, "a row of dots is read in whole vectors");
  const int64_t E = round_up(p.E, kLanes), tokens = block.tokens();
  float* const z = scratch;
  for (int64_t t = 0; t < tokens; ++t) {
    start(block.token(t), widen_row(p.z, block.token(t), p.pre, p.E, z + t * E));
  }

  alignas(64) float dots[Vec::kTokens * kMaxTileCodes];
  const int64_t tile = tile_codes(p.E);
  for (int64_t first = block.c_begin; first < block.c_end; first += tile) {
    const int64_t n = std::min(tile, block.c_end - first);
    const Matrix codes = codes_of_tile(p, first, n, scratch + tokens * E);
    for (int64_t t = 0, rows; t < tokens; t += rows) {
      rows = tokens - t >= Vec::kTokens ? Vec::kTokens : 1;
      with_row(codes, 0, [&](const auto* from) {
        score_tile(rows, takes_codes_one_by_one(p), z + t * E, E, from, codes.stride, n, E, dots);
      });
      for (int64_t r = 0; r < rows; ++r) visit(block.token(t + r), first, n, dots + r * kMaxTileCodes);
    }
  }
}
