// Rows of matrices, 16 entries at a time, whatever their dtype.
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

inline float tree_sum_of(Vec v) {
  float lanes[kLanes];
  v.store(lanes);
  return tree_sum(lanes);
}

// The largest lane; NaN lanes count as -Inf.
inline float largest_lane(Vec v) {
  float lanes[kLanes];
  v.store(lanes);
  float largest = -std::numeric_limits<float>::infinity();
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
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

// to[0, round_up(n, 64)) = row of m - minus (null: zero), padded with zeros. Returns the largest magnitude, or NaN
// if the row holds NaN or Inf.
inline float widen_row(const Matrix& m, int64_t row, const float* minus, int64_t n, float* to) {
  const Vec none = Vec::broadcast(0);
  // x - x is 0, or NaN if x is not finite. Four sums each: one would be waited for.
  Vec faults[4] = {none, none, none, none}, most[4] = {none, none, none, none};
  const auto take = [&](Vec x, int v, int64_t at) {
    faults[v] = faults[v] + (x - x);
    most[v] = Vec::larger(x.magnitude(), most[v]);
    x.store(to + at);
  };
  with_row(m, row, [&](const auto* from) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int64_t at = i + v * kLanes;
        take(minus == nullptr ? Vec::load(from + at) : Vec::load(from + at) - Vec::load(minus + at), v, at);
      }
    }
    for (; i < n; i += kLanes) {
      const Vec x = load_first(from + i, n - i);
      take(minus == nullptr ? x : x - load_first(minus + i, n - i), 0, i);
    }
    std::fill_n(to + i, round_up(n, 4 * kLanes) - i, 0.0f);
  });
  const Vec sum = (faults[0] + faults[1]) + (faults[2] + faults[3]);
  if (Vec::at_least(sum, sum) != (1u << kLanes) - 1) return std::numeric_limits<float>::quiet_NaN();
  return largest_lane(Vec::larger(Vec::larger(most[0], most[1]), Vec::larger(most[2], most[3])));
}
