// The weighted sum of each token's rows of the table.
//
//   y_t = ((sum_i w_i table[ids_i]) [/ k] [+ bias]) [+ residual_t]
//
//   what          shape    layout
//   ids, weights  [T, k]   contiguous; id -1: no code; weights null: 1
//   table         [C, D]   any stride, fp32, bf16 or fp16
//   residual      [T, D]   any stride and dtype
//   y             [T, D]   contiguous, table's dtype
//
// The sum starts at +0.0 and goes in the order of the slots: multiply, then add. Each step is rounded to
// fp32, y once more to the table's dtype.
//
// 1. List the slots that hold a code that is not deleted. A slot without a code and with the weight NaN marks
//    a row that held NaN or Inf before the selection: y_t is NaN.
// 2. For each run of vectors of y_t: add up in registers, finish, store. Meanwhile fetch what later slots read.
//
// Included inside the namespace and the target region of one instruction set, which supplies Vec.

namespace {

// Fills `slots`. Returns how many there are, or -1 if y_t is NaN.
int64_t list_slots(const DecodeParams& p, int64_t token, DecodeSlot* slots) {
  const uint32_t* const mask = p.mask.bits(token);
  int64_t n = 0;
  for (int64_t i = token * p.k; i < (token + 1) * p.k; ++i) {
    const float weight = p.weights == nullptr ? 1.0f : p.weights[i];
    if (p.ids[i] < 0) {
      if (weight != weight) return -1;
    } else if (!is_deleted(mask, p.ids[i])) {
      slots[n++] = {p.ids[i], weight};
    }
  }
  return n;
}

// Vectors of y_t that are added up in registers, and how many where fewer are left.
constexpr int kFew = 4, kRun = std::max(kFew, Vec::kSums);
// Rows that are fetched ahead, the next tokens' among them: the hardware cannot guess them. As many bytes of each dtype.
template <class T>
constexpr int64_t kAhead = 32 / sizeof(T);

// Writes y[token, d .. d + 16 kWide). With kWide = 1 it may end at D before that. `end`: of the worker's places in ids.
template <int kWide, class T>
inline void decode_run(const DecodeParams& p, int64_t token, const DecodeSlot* slots, int64_t n, int64_t d,
                       int64_t end) {
  const int64_t left = kWide > 1 ? kWide * kLanes : p.D - d;  // only a single vector may be cut short
  const T* const column = static_cast<const T*>(p.table.data) + d;
  Vec sum[kWide];
#pragma GCC unroll 16
  for (int v = 0; v < kWide; ++v) sum[v] = Vec::broadcast(0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t ahead = token * p.k + i + kAhead<T>;
    const int32_t later = ahead < end && p.ids[ahead] >= 0 ? p.ids[ahead] : slots[i].id;
    const T* const row = column + slots[i].id * p.table.stride;
    const T* const next = column + later * p.table.stride;
    const Vec weight = Vec::broadcast(slots[i].weight);
#pragma GCC unroll 16
    for (int v = 0; v < kWide; ++v) {
      if (v * kLanes * sizeof(T) % 64 == 0) __builtin_prefetch(next + v * kLanes);
      sum[v] = sum[v] + weight * load_first(row + v * kLanes, left - v * kLanes);
    }
  }
  if (p.mean) {
    const Vec k = Vec::broadcast(static_cast<float>(p.k));
#pragma GCC unroll 16
    for (int v = 0; v < kWide; ++v) sum[v] = sum[v] / k;
  }
  if (p.bias != nullptr) {
#pragma GCC unroll 16
    for (int v = 0; v < kWide; ++v) sum[v] = sum[v] + load_first(p.bias + d + v * kLanes, left - v * kLanes);
  }
  if (p.residual.data != nullptr) {
    with_row(p.residual, token, [&](const auto* row) {
#pragma GCC unroll 16
      for (int v = 0; v < kWide; ++v) sum[v] = sum[v] + load_first(row + d + v * kLanes, left - v * kLanes);
    });
  }
  T* const y = static_cast<T*>(p.y) + token * p.D + d;
#pragma GCC unroll 16
  for (int v = 0; v < kWide; ++v) store_first(sum[v], y + v * kLanes, left - v * kLanes);
}

template <class T>
void decode_tokens(const DecodeParams& p, int64_t t_begin, int64_t t_end, DecodeSlot* slots) {
  const int64_t end = t_end * p.k;
  for (int64_t token = t_begin; token < t_end; ++token) {
    const int64_t n = list_slots(p, token, slots);
    if (n < 0) {
      T nan;
      narrow(std::numeric_limits<float>::quiet_NaN(), &nan);
      std::fill_n(static_cast<T*>(p.y) + token * p.D, p.D, nan);
      continue;
    }
    int64_t d = 0;
    for (; d + kRun * kLanes <= p.D; d += kRun * kLanes) decode_run<kRun, T>(p, token, slots, n, d, end);
    for (; d + kFew * kLanes <= p.D; d += kFew * kLanes) decode_run<kFew, T>(p, token, slots, n, d, end);
    for (; d < p.D; d += kLanes) decode_run<1, T>(p, token, slots, n, d, end);
  }
}

}  // namespace

void masked_decode(const DecodeParams& p, int64_t t_begin, int64_t t_end, DecodeSlot* slots) {
  switch (p.table.dtype) {
    case Dtype::f32:
      return decode_tokens<float>(p, t_begin, t_end, slots);
    case Dtype::bf16:
      return decode_tokens<Bf16>(p, t_begin, t_end, slots);
    case Dtype::f16:
      return decode_tokens<Half>(p, t_begin, t_end, slots);
  }
}
