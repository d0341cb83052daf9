// The k best codes of each token by the certified scan: int8 products propose, exact scores decide.
//
//   approx - error <= score <= approx + error            core/scan.h defines approx and error
//
//   what           shape                         where it stays
//   plane, terms   core/scan.h                   streamed once per block of kScanTokens tokens
//   upper, lower   [kScanTokens, capacity]       scratch: bounds of each row's candidates, ids beside them
//   kept, deleted  [T, parts, capacity] keys     heaps, as in codebook_quantize-inl.h
//
// 1. start       Rows of z become integers, and those bytes (scan-inl.h). A row that cannot be certified goes to
//                the exact scan.
// 2. read_codes  Each group of 64 codes against all rows. A code whose upper bound reaches tau becomes a
//                candidate of the row; a deleted code only if hits are counted.
// 3. tighten     tau = the k-th largest lower bound. If that drops too few candidates, some are scored, and
//                tau = the k-th best exact score. A full buffer is scored too: no candidate is dropped
//                unseen. A row that scores too many that way (all codes equal, a few tight clusters) goes to
//                the exact scan.
// 4. finish      Scores what is left, likeliest first, then runs the exact scan for the rows that need it.
//
// Included inside the namespace and the target region of one instruction set, after codebook_quantize-inl.h.

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();  // no bound: below every score

// Covers the rounding errors of computing the bound.
constexpr float kWiden = 1.0f + 0x1p-18f;

// Bytes of codes that all rows score before any row goes on: 1 MiB, which stays in an L2 cache.
constexpr int64_t kSpanBytes = 1024 * 1024;

// A row that has scored more than 1 / kGiveUp of the codes before finish() goes to the exact scan. The exact
// scan scores four rows against four codes at a time and takes about 4 times as long as the scan; scoring all
// codes one by one takes about 14 times as long.
constexpr int64_t kGiveUp = 16;

// The certified scan of one block.
class Scan {
 public:
  Scan(const SelectParams& params, const Block& block, float* scratch)
      : p(params),
        block_(block),
        scratch_(scratch),
        sizes_(params),
        bias_rounding_(0x1p-20f * params.largest_bias) {}

  // Converts the tokens that can be certified to rows, and notes the others for the exact scan. A token with
  // NaN or Inf is in neither: its heaps are marked, and nothing is left to do.
  void start() {
    for (int64_t token = block_.t_begin; token < block_.t_end; ++token) {
      Row& row = rows_[n_];
      row.token = token;
      row.fixed = reinterpret_cast<int16_t*>(scratch_ + sizes_.fixed()) + n_ * sizes_.width * 3;
      row.bytes = reinterpret_cast<int8_t*>(scratch_ + sizes_.bytes()) + n_ * sizes_.width;
      row.outliers = reinterpret_cast<ScanOutlier*>(scratch_ + sizes_.outlier()) + n_ * sizes_.outliers;
      row.upper = scratch_ + sizes_.upper() + n_ * sizes_.capacity;
      row.lower = scratch_ + sizes_.lower() + n_ * sizes_.capacity;
      row.id = reinterpret_cast<int32_t*>(scratch_ + sizes_.id()) + n_ * sizes_.capacity;
      row.lower_all = sizes_.counts_hits ? scratch_ + sizes_.lower_all() + n_ * sizes_.capacity : nullptr;
      row.n = row.scored = 0;
      row.gives_up = false;
      row.trigger = 4 * kScanGroup;
      row.tau = row.tau_all = kNone;
      float* const z = scratch_ + sizes_.z();
      const float largest = widen_row(p.score.z, token, p.score.pre, p.score.E, z);
      const bool finite = largest == largest;
      start_heaps(candidates_of(p, block_, token), !finite);
      if (!finite) continue;
      row.fixed_unit = fix_row(z, sizes_.width, largest);
      Pair::cut(z, sizes_.width, row.fixed);
      const Vec unit = Vec::broadcast(row.fixed_unit);
      for (int64_t e = 0; e < sizes_.width; e += kLanes) (Vec::load(z + e) * unit).store(z + e);  // exact
      if (quantize_row(p, z, row)) {
        ++n_;
      } else {
        exact_[exact_n_++] = token;
      }
    }
  }

  // Reads the plane once, for all rows.
  void read_codes() {
    const int64_t steps = scan_width(p.score.E) / 4;
    alignas(64) int32_t sums[Ints::kTokens * kScanGroup], high[kScanGroup];
    for (int64_t g = block_.c_begin / kScanGroup; g * kScanGroup < block_.c_end; ++g) {
      const uint8_t* const codes = p.scan.group(g, p.score.E);
      for (int64_t t = 0, taken; t < n_; t += taken) {
        taken = scan_rows(rows_ + t, n_ - t, codes, steps, sums);
        for (int64_t r = 0; r < taken; ++r) {
          Row& row = rows_[t + r];
          if (row.gives_up) continue;
          const bool sparse = row.outlier_count > 0;
          if (sparse) outlier_dots(row, codes, high);
          pass(row, g, sums + r * kScanGroup, sparse ? high : nullptr);
          if (row.n >= row.trigger) tighten(row);
        }
      }
    }
  }

  // Scores the remaining candidates, first those whose lower bound is among the k largest. All rows visit the
  // codes in step, so that a code is read from memory once for all of them.
  void finish() {
    for (Row* row = rows_; row < rows_ + n_; ++row) {
      find_best(*row);
      drop_hopeless(*row);
    }
    visit_candidates([](Row& row, int64_t i) {
      if (row.lower[i] < row.best) return false;
      row.upper[i] = kNone;  // scored: the second pass skips it
      return true;
    });
    visit_candidates([](Row& row, int64_t i) { return !(row.upper[i] < row.tau); });
    for (int64_t first = 0; first < exact_n_; first += kBlockTokens) {
      const int64_t last = std::min(exact_n_, first + kBlockTokens);
      const Block block{first, last, block_.c_begin, block_.c_end, block_.part, exact_};
      select_exact(p, block, scratch_ + sizes_.floats());
    }
  }

 private:
  // Scores the candidates for which choose(row, i) is true, in the order of the codes' ids.
  template <class Choose>
  void visit_candidates(Choose choose) {
    for (Row* row = rows_; row < rows_ + n_; ++row) row->visited = 0;
    const int64_t span = std::max<int64_t>(kScanGroup, kSpanBytes / (kDigits * sizes_.width));
    for (int64_t end = block_.c_begin + span; end < block_.c_end + span; end += span) {
      for (Row* row = rows_; row < rows_ + n_; ++row) {
        int64_t i = row->visited;
        for (; i < row->n && row->id[i] < end; ++i) {
          if (choose(*row, i)) add(*row, row->id[i]);
        }
        row->visited = i;
      }
    }
    flush();
  }

  // Queues a code to be scored. Scoring four at a time hides the latency of the memory.
  void add(Row& row, int32_t id) {
    batch_row_[batch_] = &row;
    batch_id_[batch_] = id;
    if (++batch_ == 4) flush();
  }

  // Scores the queued codes, offers them to the heaps of their rows, and raises tau.
  void flush() {
    const ScoreParams& score = p.score;
    const int64_t n = std::exchange(batch_, 0);
    if (n == 0) return;
    const int16_t* rows[4];
    const int8_t* codes[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t some = std::min(i, n - 1);
      rows[i] = batch_row_[some]->fixed, codes[i] = score.code(batch_id_[some]);
    }
    int64_t sums[4];
    Pair::dots(rows, codes, sizes_.width, sums);
    for (int64_t i = 0; i < n; ++i) {
      Row& row = *batch_row_[i];
      const int32_t id = batch_id_[i];
      float y = cut(static_cast<float>(sums[i]) * row.fixed_unit * score.factor[id]);
      if (score.bias != nullptr) y = cut(y + score.bias[id]);
      Candidates candidates = candidates_of(p, block_, row.token);
      if (y >= candidates.kept.threshold()) candidates.offer(y, id);
      row.tau = std::max(row.tau, candidates.kept.threshold());
    }
  }

  // Frees places in a row's buffer of candidates.
  void tighten(Row& row) {
    const int64_t room = sizes_.capacity - kScanGroup;
    find_best(row);
    drop_hopeless(row);
    if (row.n > std::clamp<int64_t>(p.score.E, 512, room / 2)) score_those(row, row.best);
    if (row.n > room * 3 / 4) score_those(row, kNone);
    if (row.scored * kGiveUp > block_.c_end - block_.c_begin) {
      row.gives_up = true;
      row.n = 0;
      exact_[exact_n_++] = row.token;
    }
    row.trigger = std::min(room, 2 * row.n + 2 * kScanGroup);
  }

  // Raises tau to the k-th largest lower bound. If hits are counted, also tau_all, from all codes, deleted
  // ones included.
  void find_best(Row& row) const {
    row.best = kth_lower(row.lower, row.n, row.tau);
    row.tau = std::max(row.tau, row.best);
    if (row.lower_all != nullptr) {
      row.tau_all = std::max({row.tau, row.tau_all, kth_lower(row.lower_all, row.n, row.tau_all)});
    }
  }

  // Drops the candidates that can no longer be selected, and the deleted ones that can no longer be hits.
  static void drop_hopeless(Row& row) {
    const Vec tau = Vec::broadcast(row.tau), tau_all = Vec::broadcast(row.tau_all),
              none = Vec::broadcast(kNone);
    int64_t n = 0;
    for (int64_t i = 0; i < row.n; i += kLanes) {
      const Vec upper = Vec::load(row.upper + i), lower = Vec::load(row.lower + i);
      uint32_t lanes = Vec::not_below(upper, tau);
      if (row.n - i < kLanes) lanes &= (1u << (row.n - i)) - 1;
      if (row.lower_all != nullptr) {
        const Vec lower_all = Vec::load(row.lower_all + i);
        lanes &= ~Vec::at_least(none, lower) | Vec::not_below(upper, tau_all);
        lower_all.store_lanes(lanes, row.lower_all + n);
      }
      upper.store_lanes(lanes, row.upper + n);
      lower.store_lanes(lanes, row.lower + n);
      keep_ids(lanes, row.id + i, row.id + n);
      n += std::popcount(lanes);
    }
    row.n = n;
  }

  // Scores the candidates whose lower bound reaches `best`, and removes them from the buffer.
  void score_those(Row& row, float best) {
    int64_t n = 0;
    for (int64_t i = 0; i < row.n; ++i) {
      if (row.lower[i] < best) {
        row.upper[n] = row.upper[i], row.lower[n] = row.lower[i], row.id[n] = row.id[i];
        if (row.lower_all != nullptr) row.lower_all[n] = row.lower_all[i];
        ++n;
      } else if (!(row.upper[i] < row.tau)) {
        add(row, row.id[i]);
        ++row.scored;
      }
    }
    row.n = n;
    flush();
    drop_hopeless(row);
  }

  // A value that at least k of the n bounds reach, by bisection: near the k-th largest. kNone if fewer than k
  // reach `low`, which is then at least as good.
  float kth_lower(const float* bounds, int64_t n, float low) const {
    if (low == kNone) {
      low = std::numeric_limits<float>::max();
      for (int64_t i = 0; i < n; ++i) {
        if (bounds[i] > kNone) low = std::min(low, bounds[i]);
      }
    }
    if (count_at_least(bounds, n, low) < p.k) return kNone;
    float high = largest_of(bounds, n);
    for (int step = 0; step < 10; ++step) {
      const float middle = low + (high - low) * 0.5f;
      const int64_t reach = count_at_least(bounds, n, middle);
      (reach >= p.k ? low : high) = middle;
      if (reach == p.k) break;
    }
    return low;
  }

  // Adds the codes of a group whose upper bound reaches tau to the row's candidates. `high` is null if the
  // row has no outliers.
  void pass(Row& row, int64_t g, const int32_t* sums, const int32_t* high) {
    const float *scale = p.scan.terms_of(g, kScale), *residual = p.scan.terms_of(g, kResidual),
                *size = p.scan.terms_of(g, kSize);
    const float rounding = row.slop * p.scan.largest(g, kMagnitude) + bias_rounding_;
    const float most = row.norm_in * p.scan.largest(g, kResidual) + row.miss * p.scan.largest(g, kSize) +
                       row.half_l1_out * p.scan.largest(g, kScale) + rounding;
    const Vec limit = Vec::broadcast(row.tau - kWiden * most), unit = Vec::broadcast(row.unit);
    const int64_t first = g * kScanGroup, n = std::min<int64_t>(kScanGroup, p.score.C - first);

    alignas(64) float approx[kScanGroup];
    uint64_t reach = 0;
    if (high == nullptr && p.scan.mean == nullptr && p.score.bias == nullptr) {
#pragma GCC unroll 4
      for (int j = 0; j < kScanGroup; j += kLanes) {
        const Vec score = Vec::load(sums + j) * Vec::load(scale + j) * unit;
        score.store(approx + j);
        reach |= uint64_t{Vec::not_below(score, limit)} << j;
      }
    } else {
      const Vec base = Vec::broadcast(2 * Ints::kRange), mean_dot = Vec::broadcast(row.mean_dot);
      for (int j = 0; j < n; j += kLanes) {
        Vec sum = Vec::load(sums + j);
        if (high != nullptr) sum = sum + base * Vec::load(high + j);
        Vec score = sum * Vec::load(scale + j) * unit;
        if (p.scan.mean != nullptr) {
          score = score + mean_dot * load_first(p.score.factor + first + j, n - j);
        }
        if (p.score.bias != nullptr) score = score + load_first(p.score.bias + first + j, n - j).cut();
        score.store(approx + j);
        reach |= uint64_t{Vec::not_below(score, limit)} << j;
      }
    }
    if (reach == 0) return;

    if (n < kScanGroup) reach &= (uint64_t{1} << n) - 1;
    const uint32_t* const mask = p.mask.bits(row.token);
    const uint64_t group_deleted = mask == nullptr ? 0 : deleted_of_group(mask, g, p.score.C);
    if (p.deleted == nullptr) reach &= ~group_deleted;
    const Vec tau = Vec::broadcast(row.tau), widen = Vec::broadcast(kWiden),
              rounding_of = Vec::broadcast(rounding);
    const Vec norm_in = Vec::broadcast(row.norm_in), miss = Vec::broadcast(row.miss),
              half_l1_out = Vec::broadcast(row.half_l1_out);
    for (int j = 0; j < kScanGroup; j += kLanes) {
      uint32_t lanes = reach >> j & 0xffff;
      if (lanes == 0) continue;
      const Vec error = (norm_in * Vec::load(residual + j) + miss * Vec::load(size + j) +
                         half_l1_out * Vec::load(scale + j).magnitude() + rounding_of) *
                        widen;
      const Vec score = Vec::load(approx + j), upper = score + error;
      const Vec lower = score - error;
      lanes &= Vec::not_below(upper, tau);
      const uint32_t deleted =
          lanes & static_cast<uint32_t>(group_deleted >> j);  // none, unless hits are counted
      if (deleted != 0) lanes &= ~deleted | Vec::not_below(upper, Vec::broadcast(row.tau_all));
      upper.store_lanes(lanes, row.upper + row.n);
      lower.store_lanes(lanes, row.lower + row.n);
      store_ids(lanes, static_cast<int32_t>(first + j), row.id + row.n);
      if (row.lower_all != nullptr) lower.store_lanes(lanes, row.lower_all + row.n);
      for (uint32_t drop = lanes & deleted; drop != 0; drop &= drop - 1) {
        row.lower[row.n + std::popcount(lanes & ((drop & -drop) - 1))] = kNone;
      }
      row.n += std::popcount(lanes);
    }
  }

  const SelectParams& p;
  const Block block_;
  float* const scratch_;
  const ScanScratch sizes_;
  const float bias_rounding_;
  Row rows_[kScanTokens];
  int64_t n_ = 0;
  int64_t exact_[kScanTokens];  // tokens for the exact scan
  int64_t exact_n_ = 0;
  Row* batch_row_[4];
  int32_t batch_id_[4];
  int64_t batch_ = 0;
};

}  // namespace

void select_scan(const SelectParams& p, const Block& block, float* scratch) {
  Scan scan(p, block, scratch);
  scan.start();
  scan.read_codes();
  scan.finish();
}
