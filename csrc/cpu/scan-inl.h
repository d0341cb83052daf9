// The arithmetic of the certified scan: rows of z as bytes, and their integer products with the plane.
//
//   q_t ~ step (low_t + base high_t)     sums[t][j] = <low_t, c_j>; for a row with outliers also <high_t, c_j>
//
//   what            shape                             where it stays
//   a row q         [round_up(E, 64)]                 integers, as fp32, in scratch
//   low bytes       [kScanTokens, round_up(E, 64)]    L2 cache; kTokens rows of them L1 cache
//   group of codes  [scan_width(E), 64] bytes         streamed; read by all tokens of the block
//   partial sums    [kTokens, kGroups, 16]            registers
//
// 1. quantize_row  Converts a row to bytes, and computes its terms of the error bound (core/scan.h), rounded
//                  up. The few entries far above the others, which would make the step coarse for all, get
//                  high bytes too.
// 2. RowProducts   The rows against a group of 64 codes, a few at a time: byte_dots, the hot loop; and the high bytes of one
//                  row: outlier_dots, a few steps only. On matrix tiles: scan_tiles-inl.h.
// 3. approximate   The sums of one row and group become approximations of scores.
// 4. kth_lower     A threshold that k of some bounds reach.
//
// Included inside the namespace and the target region of one instruction set, which supplies Vec, Ints and
// Bytes, after rows-inl.h.

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();  // no bound: below every score

// One row in the scan, and its candidates.
struct Row {
  int64_t token;
  int16_t* fixed;  // the row's integers, as Pair takes them
  float unit;      // theirs: 2^-a
  int8_t* bytes;   // [round_up(E, 64)]
  ScanOutlier* outliers;
  int64_t outlier_count;
  int32_t start, outlier_start;            // - kOffset * sum of the bytes: cancels the codes' offset
  float step;                              // times the unit
  float base;                              // of the high bytes
  float mean_dot;                          // <q, mean>, not times the unit
  float norm_in, miss, half_l1_out, norm;  // factors of residual, size, |scale| and magnitude in the error

  float* sample;         // approximations of the groups of the guess
  float guess;           // of the k-th best score; kNone: none
  float tau;             // at most the k-th best score, or the guess: codes below it are not selected
  float best;            // the k-th largest lower bound
  float *upper, *lower;  // lower is kNone for a deleted code, so that it cannot raise tau
  // Only when hits are counted: lower bounds and threshold over all codes, deleted ones included. A deleted
  // code below tau_all would not be selected without the mask either.
  float* lower_all;  // null: hits are not counted
  float tau_all;
  int32_t* id;
  int64_t n, trigger;  // candidates, in the order of their ids; `trigger` of them start tighten()
  int64_t scored;      // candidates scored before score(), to free places in the buffer
  bool gives_up;       // scored exceeded the limit (kGiveUp): the row goes to the exact scan
  int64_t visited;     // candidates that visit_candidates has passed
};

// The clip: the largest |q| that low bytes represent. It is the row's largest |q|, halved as long as at most
// max_outliers entries are above it.
float clip_of(const float* q, int64_t E, float largest) {
  float clip = largest;
  for (int halvings = 0; halvings < kMaxHalvings; ++halvings) {
    const Vec half = Vec::broadcast(clip / 2);
    int64_t above = 0;
    for (int64_t e = 0; e < E; e += kLanes) {
      above += kLanes - std::popcount(Vec::at_least(half, Vec::load(q + e).magnitude()));
    }
    if (above > max_outliers(E)) break;
    clip /= 2;
  }
  return clip;
}

// Splits those of 16 entries (in steps, in `lanes`) that do not fit a byte. The low byte stays in `lanes`,
// the high byte goes to the row's list of outliers.
void split_outliers(Row& row, int64_t first, const float* q, float* lanes, float* l1_out) {
  constexpr int kBase = 2 * Ints::kRange;
  for (int l = 0; l < kLanes; ++l) {
    if (std::fabs(lanes[l]) <= Ints::kRange) continue;
    const float high = std::nearbyint(lanes[l] / kBase);
    lanes[l] -= kBase * high;
    *l1_out += std::fabs(q[l]);
    const int32_t step = static_cast<int32_t>((first + l) / 4);
    if (row.outlier_count == 0 || row.outliers[row.outlier_count - 1].step != step) {
      row.outliers[row.outlier_count++] = {step, {}};
    }
    row.outliers[row.outlier_count - 1].bytes[l % 4] = static_cast<int8_t>(high);
    row.outlier_start -= kOffset * static_cast<int32_t>(high);
  }
}

// <q, mean>, which kScanRounding takes for exact.
double dot_mean(const float* q, const float* mean, int64_t E) {
  double lanes[kLanes] = {}, sum = 0;
  for (int64_t e = 0; e < E; ++e) lanes[e % kLanes] += double{q[e]} * mean[e];
  for (double lane : lanes) sum += lane;
  return sum;
}

// Computes the bytes and the error terms of a row q [round_up(E, 64)] of this unit.
void quantize_row(const SelectParams& p, const float* q_row, Row& row) {
  const int64_t E = round_up(p.score.E, kLanes);
  Vec most = Vec::broadcast(0), squares = Vec::broadcast(0);
  for (int64_t e = 0; e < E; e += kLanes) {
    const Vec q = Vec::load(q_row + e);
    most = Vec::larger(most, q.magnitude());
    squares = squares + q * q;
  }

  float lanes[kLanes];
  constexpr float kRange = Ints::kRange;
  const float clip = std::max(clip_of(q_row, E, largest_lane(most)), kRange);  // step >= 1
  const Vec per_step = Vec::broadcast(kRange / clip), step = Vec::broadcast(clip / kRange),
            range = Vec::broadcast(kRange);
  row.outlier_count = row.start = row.outlier_start = 0;
  row.base = 2 * kRange;
  Vec misses = Vec::broadcast(0), squares_in = Vec::broadcast(0);
  float l1_out = 0;
  for (int64_t e = 0; e < E; e += kLanes) {
    const Vec q = Vec::load(q_row + e);
    Vec whole = (q * per_step).nearest();
    const Vec miss = q - step * whole;
    misses = misses + miss * miss;
    Vec in = q;
    const uint32_t fit = Vec::at_least(range, whole.magnitude());
    if (fit != (1u << kLanes) - 1) {
      for (int l = 0; l < kLanes; ++l) lanes[l] = fit >> l & 1 ? q_row[e + l] : 0.0f;
      in = Vec::load(lanes);
      whole.store(lanes);
      split_outliers(row, e, q_row + e, lanes, &l1_out);
      whole = Vec::load(lanes);
    }
    squares_in = squares_in + in * in;
    whole.store_bytes(row.bytes + e);
  }
  int32_t sum = 0;
  for (int64_t e = 0; e < E; ++e) sum += row.bytes[e];
  row.start = -kOffset * sum;

  // A sum of squares is off by at most one rounding per addend of a lane.
  const float grow = 1.0f + 0x1p-23f * static_cast<float>(E / kLanes + 16);
  const float norm = std::sqrt(tree_sum_of(squares)) * grow;
  const float rounding = 0x1p-22f * norm;  // of step * whole, and of q minus it
  row.step = clip / kRange * row.unit;
  row.norm = norm_of(norm * row.unit);
  row.norm_in = std::sqrt(tree_sum_of(squares_in)) * grow * row.unit;
  row.miss = std::max(std::sqrt(tree_sum_of(misses)) * grow + rounding, 1.0f) * row.unit;
  row.half_l1_out = 0.5f * l1_out * grow * row.unit;
  row.mean_dot = 0;
  if (p.scan.mean != nullptr) row.mean_dot = static_cast<float>(dot_mean(q_row, p.scan.mean, p.score.E));
}

// The hot loop: kTokens rows against 64 codes, 16 kGroups codes at a time.
template <int kTokens>
[[gnu::noinline]] void byte_dots(const Row* rows, const uint8_t* codes, int64_t steps, int32_t* sums) {
  constexpr int kGroups = Ints::kGroups, kStride = 4 * kScanGroup;
  const int8_t* bytes[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) bytes[t] = rows[t].bytes;
  for (int first = 0; first < kScanGroup; first += kGroups * kLanes, codes += 4 * kGroups * kLanes) {
    Ints sum[kTokens][kGroups];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) sum[t][g] = Ints::broadcast(rows[t].start);
    }
    for (int64_t i = 0; i < steps; ++i) {
      Bytes code[kGroups];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) code[g] = Bytes::load(codes + i * kStride + g * 4 * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const Bytes row = Bytes::repeat(bytes[t] + i * 4);
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) sum[t][g].add_products(code[g], row);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) sum[t][g].store(sums + t * kScanGroup + first + g * kLanes);
    }
  }
}

// The same for the high bytes of one row, in the steps that have any.
[[gnu::noinline]] void outlier_dots(const Row& row, const uint8_t* codes, int32_t* sums) {
  constexpr int kGroups = Ints::kGroups;
  for (int first = 0; first < kScanGroup; first += kGroups * kLanes, codes += 4 * kGroups * kLanes) {
    Ints sum[kGroups];
    for (int g = 0; g < kGroups; ++g) sum[g] = Ints::broadcast(row.outlier_start);
    for (int64_t i = 0; i < row.outlier_count; ++i) {
      const uint8_t* const code = codes + row.outliers[i].step * int64_t{4 * kScanGroup};
      const Bytes high = Bytes::repeat(row.outliers[i].bytes);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) sum[g].add_products(Bytes::load(code + g * 4 * kLanes), high);
    }
    for (int g = 0; g < kGroups; ++g) sum[g].store(sums + first + g * kLanes);
  }
}

// Multiplies the first few of n rows with a group: sums [rows, 64]. Returns how many rows.
inline int64_t scan_rows(const Row* rows, int64_t n, const uint8_t* codes, int64_t steps, int32_t* sums) {
  const auto run = [&]<int kTokens>() {
    byte_dots<kTokens>(rows, codes, steps, sums);
    return kTokens;
  };
  if constexpr (Ints::kTokens > 4) {
    // 8 rows go as 4 + 4 rather than 6 + 2.
    if (n >= Ints::kTokens && n != 8) return run.template operator()<Ints::kTokens>();
    if (n >= 4) return run.template operator()<4>();
  }
  if (n >= 2 && Ints::kTokens > 1) return run.template operator()<2>();
  return run.template operator()<1>();
}

// Multiplies the rows of a block with the plane.
class RowProducts {
 public:
  RowProducts(const SelectParams& params, const ScanScratch&, float*) : p(params) {}

  // The rows from now on.
  void take(std::span<Row> rows) { rows_ = rows; }

  // Calls use(row, group, sums, high) for each row and a group; high is null if the row has no outliers.
  template <class Use>
  void multiply(int64_t g, const Use& use) {
    const int64_t steps = scan_width(p.score.E) / 4;
    const uint8_t* const codes = p.scan.group(g, p.score.E);
    alignas(64) int32_t sums[Ints::kTokens * kScanGroup], high[kScanGroup];
    const int64_t n = std::ssize(rows_);
    for (int64_t t = 0, taken; t < n; t += taken) {
      taken = scan_rows(&rows_[t], n - t, codes, steps, sums);
      for (int64_t r = 0; r < taken; ++r) {
        Row& row = rows_[t + r];
        if (row.gives_up) continue;
        const bool sparse = row.outlier_count > 0;
        if (sparse) outlier_dots(row, codes, high);
        use(row, g, sums + r * kScanGroup, sparse ? high : nullptr);
      }
    }
  }

  // All that was multiplied has been used.
  template <class Use>
  void finish(const Use&) {}

 private:
  const SelectParams& p;
  std::span<Row> rows_;
};

// The approximations of 16 scores of a group, of codes beyond C too. `high` is null if the row has no high bytes.
inline Vec approximation(const SelectParams& p, const Row& row, int64_t g, int j, const int32_t* sums,
                         const int32_t* high) {
  Vec sum = Vec::load(sums + j);
  if (high != nullptr) sum = sum + Vec::broadcast(row.base) * Vec::load(high + j);
  Vec score = sum * Vec::load(p.scan.terms_of(g, kScale) + j) * Vec::broadcast(row.step);
  if (p.scan.mean == nullptr && p.score.bias == nullptr) return score;
  const int64_t first = g * kScanGroup + j, n = std::max<int64_t>(p.score.C - first, 0);
  if (p.scan.mean != nullptr) {
    score = score +
            Vec::broadcast(row.mean_dot) * load_first(p.score.factor + first, n) * Vec::broadcast(row.unit);
  }
  if (p.score.bias != nullptr) score = score + load_first(p.score.bias + first, n).cut();
  return score;
}

// How many of the n bounds are at least x.
int64_t count_at_least(const float* bounds, int64_t n, float x) {
  const Vec limit = Vec::broadcast(x);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    uint32_t reach = Vec::at_least(Vec::load(bounds + i), limit);
    if (n - i < kLanes) reach &= (1u << (n - i)) - 1;
    count += std::popcount(reach);
  }
  return count;
}

float largest_of(const float* bounds, int64_t n) {
  Vec most = Vec::broadcast(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  // A NaN bound leaves `most` as it is: larger() then returns its second argument.
  for (; i + kLanes <= n; i += kLanes) most = Vec::larger(Vec::load(bounds + i), most);
  float lanes[kLanes];
  most.store(lanes);
  float largest = *std::max_element(lanes, lanes + kLanes);
  for (; i < n; ++i) largest = bounds[i] > largest ? bounds[i] : largest;
  return largest;
}

// A value that at least k of the n bounds reach, near the k-th largest, by bisection. kNone if fewer than k reach `low`,
// which is then at least as good. Where low is kNone, steps down from the largest that double come first.
float kth_lower(const float* bounds, int64_t n, float low, int64_t k) {
  const bool searches = low == kNone;
  if (searches) low = std::numeric_limits<float>::lowest();
  if (count_at_least(bounds, n, low) < k) return kNone;
  const float largest = largest_of(bounds, n);
  float high = largest;
  for (float step = std::fabs(largest) / 64; searches && largest - step > low; step = 2 * step + 0x1p-126f) {
    const bool reached = count_at_least(bounds, n, largest - step) >= k;
    (reached ? low : high) = largest - step;
    if (reached) break;
  }
  for (int i = 0; i < 8; ++i) {
    const float middle = low + (high - low) * 0.5f;
    const int64_t reach = count_at_least(bounds, n, middle);
    (reach >= k ? low : high) = middle;
    if (reach == k) break;
  }
  return low;
}

}  // namespace
