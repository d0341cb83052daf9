// The k best codes of each token by the certified scan: int8 products propose, exact scores decide.
//
//   approx - error <= score <= approx + error            core/scan.h defines approx and error
//
//   what           shape                         where it stays
//   plane, terms   core/scan.h                   streamed once per block of kScanTokens tokens
//   sample         [kScanTokens, samples]        scratch: approximations of every 16th group, for the guess
//   upper, lower   [kScanTokens, capacity]       scratch: bounds of each row's candidates, ids beside them
//   kept, deleted  [T, parts, capacity] keys     heaps, as in codebook_quantize-inl.h
//
// 1. start       Rows of z become integers, and those bytes (scan-inl.h).
// 2. guess       tau = an approximation that ranks so high in a sample of the groups that k codes should be above it.
// 3. read_codes  Each group of 64 codes against all rows. A code whose upper bound reaches tau becomes a
//                candidate of the row; a deleted code only if hits are counted.
// 4. tighten     tau = the k-th largest lower bound. If that drops too few candidates, some are scored, and
//                tau = the k-th best exact score. A full buffer is scored too: no candidate is dropped
//                unseen. A row that scores too many that way (all codes equal, a few tight clusters) goes to
//                the exact scan.
// 5. score       Scores what is left, likeliest first.
// 6. run         The guess held if k exact scores reach it: then no code below it is selected. Rows that it misled
//                are read again without one; the exact scan does those that gave up.
//
// Included inside the namespace and the target region of one instruction set, after codebook_quantize-inl.h, and where
// Products is RowProducts, or another class like it.

namespace {

// Covers the rounding errors of computing the bound.
constexpr float kWiden = 1.0f + 0x1p-18f;

// Bytes of codes that all rows score before any row goes on: 1 MiB, which stays in an L2 cache.
constexpr int64_t kSpanBytes = 1024 * 1024;

// A row that has scored more than 1 / kGiveUp of the codes before score() goes to the exact scan, which scores four
// rows against four codes at a time and takes as long as scoring a seventh of the codes one by one.
constexpr int64_t kGiveUp = 8;

// The certified scan of one block. Products multiplies rows with the plane: RowProducts, or the like.
template <class Products>
class Scan {
 public:
  Scan(const SelectParams& params, const Block& block, float* scratch)
      : p(params),
        block_(block),
        scratch_(scratch),
        sizes_(params),
        products_(params, sizes_, scratch),
        first_group_(block.c_begin / kScanGroup),
        groups_(scan_groups(block.c_end) - first_group_),
        samples_(sample_groups(groups_)) {}

  void run() {
    start();
    const std::span<Row> all = rows_;
    if (samples_ > 0) guess();
    read_codes();
    score();
    // Again are those that the guess misled. Those that were left out are behind them already.
    const auto again = std::partition(rows_.begin(), rows_.end(), [&](const Row& row) {
      return row.gives_up || candidates_of(p, block_, row.token).kept.threshold() >= row.guess;
    });
    rows_ = {again, all.end()};
    for (Row& row : rows_) {
      start_heaps(candidates_of(p, block_, row.token), false);
      restart(row, kNone);
    }
    if (!rows_.empty()) read_codes(), score();
    for (int64_t first = 0; first < exact_n_; first += kBlockTokens) {
      const int64_t last = std::min(exact_n_, first + kBlockTokens);
      const Block block{first, last, block_.c_begin, block_.c_end, block_.part, exact_};
      select_exact(p, block, scratch_ + sizes_.floats());
    }
  }

 private:
  // Converts the tokens to rows. One with NaN or Inf becomes none: its heaps are marked, and nothing is left to do.
  void start() {
    int64_t n = 0;
    for (int64_t token = block_.t_begin; token < block_.t_end; ++token) {
      Row& row = storage_[n];
      row.token = token;
      row.fixed = reinterpret_cast<int16_t*>(scratch_ + sizes_.fixed()) + n * sizes_.width * 3;
      row.bytes = reinterpret_cast<int8_t*>(scratch_ + sizes_.bytes()) + n * sizes_.width;
      row.outliers = reinterpret_cast<ScanOutlier*>(scratch_ + sizes_.outlier()) + n * sizes_.outliers;
      row.upper = scratch_ + sizes_.upper() + n * sizes_.capacity;
      row.lower = scratch_ + sizes_.lower() + n * sizes_.capacity;
      row.id = reinterpret_cast<int32_t*>(scratch_ + sizes_.id()) + n * sizes_.capacity;
      row.lower_all = sizes_.counts_hits ? scratch_ + sizes_.lower_all() + n * sizes_.capacity : nullptr;
      row.sample = scratch_ + sizes_.sample() + n * sizes_.samples;
      restart(row, kNone);
      float* const z = scratch_ + sizes_.z();
      const float largest = widen_row(p.score.z, token, p.score.pre, p.score.E, z);
      const bool finite = largest == largest;
      start_heaps(candidates_of(p, block_, token), !finite);
      if (!finite) continue;
      row.unit = fix_row(z, sizes_.width, largest);
      Pair::cut(z, sizes_.width, row.fixed);
      quantize_row(p, z, row);
      ++n;
    }
    rows_ = {storage_, static_cast<size_t>(n)};
  }

  // Forgets a row's candidates. `guess` is a threshold that has to be proven; kNone: there is none.
  static void restart(Row& row, float guess) {
    row.n = row.scored = 0;
    row.gives_up = false;
    row.trigger = 4 * kScanGroup;
    row.guess = row.tau = row.tau_all = guess;
  }

  // The group that sample i is taken from.
  int64_t sampled(int64_t i) const { return first_group_ + i * groups_ / samples_; }

  // The sample that a group is, if it is one: the first that is not taken from a group before it.
  int64_t sample_of(int64_t g) const { return ((g - first_group_) * samples_ + groups_ - 1) / groups_; }

  // Guesses tau per row. m of the k best should be in the sample; their number varies by sqrt(m).
  void guess() {
    const auto keep = [&](Row& row, int64_t g, const int32_t* sums, const int32_t* high) {
      float* const approx = row.sample + sample_of(g) * kScanGroup;
      for (int j = 0; j < kScanGroup; j += kLanes) approximation(p, row, g, j, sums, high).store(approx + j);
    };
    products_.take(rows_);
    for (int64_t i = 0; i < samples_; ++i) products_.multiply(sampled(i), keep);
    products_.finish(keep);
    const float m = static_cast<float>(p.k * samples_) / static_cast<float>(groups_);
    rank_ = static_cast<int64_t>(std::ceil(m + 3 * std::sqrt(m) + 1));
    for (Row& row : rows_) {
      const uint32_t* const mask = p.mask.bits(row.token);
      std::copy_n(row.sample, samples_ * kScanGroup, row.upper);
      for (int64_t i = 0; mask != nullptr && i < samples_; ++i) {
        for (uint64_t left = deleted_of_group(mask, sampled(i), p.score.C); left != 0; left &= left - 1) {
          row.upper[i * kScanGroup + std::countr_zero(left)] = kNone;
        }
      }
      restart(row, kth_lower(row.upper, samples_ * kScanGroup, kNone, rank_));
    }
  }

  // Leaves out the rows whose guess is likely too high: an eighth of the groups should hold more than twice as many codes
  // above it as the sample, whose own do not count.
  void leave_out_doubtful() {
    const auto end = std::partition(rows_.begin(), rows_.end(), [&](const Row& row) {
      if (row.gives_up || row.guess == kNone) return true;
      const int64_t others = std::count_if(row.id, row.id + row.n, [&](int32_t id) {
        const int64_t g = id / kScanGroup;
        return sampled(sample_of(g)) != g;
      });
      return others + row.scored >= rank_ / 2;
    });
    rows_ = {rows_.begin(), end};
  }

  // Passes each group by all rows.
  void read_codes() {
    const auto pass = [&](Row& row, int64_t g, const int32_t* sums, const int32_t* high) {
      consider(row, g, [&](int j) { return approximation(p, row, g, j, sums, high); });
    };
    gather();
    for (int64_t i = 0, sample = 0; i < groups_; ++i) {
      const int64_t g = first_group_ + i;
      if (i == groups_ / 8 && samples_ > 0) {
        products_.finish(pass);
        leave_out_doubtful();
        gather();
      }
      if (sample < samples_ && g == sampled(sample)) {
        products_.finish(pass);
        set_limits(g);
        for (Row& row : rows_) {
          const float* const approx = row.sample + sample * kScanGroup;
          if (!row.gives_up) consider(row, g, [&](int j) { return Vec::load(approx + j); });
        }
        ++sample;
        continue;
      }
      set_limits(g);
      products_.multiply(g, pass);
    }
    products_.finish(pass);
  }

  // Copies what the limits are made of, one array per term.
  void gather() {
    products_.take(rows_);
    for (int64_t t = 0; t < std::ssize(rows_); ++t) {
      const Row& row = rows_[t];
      limits_.norm_in[t] = row.norm_in, limits_.miss[t] = row.miss, limits_.half_l1_out[t] = row.half_l1_out;
      limits_.norm[t] = row.norm, limits_.tau[t] = row.tau;
    }
  }

  // The rows' limits in a group: a code is no candidate of a row whose limit its approximation does not reach.
  void set_limits(int64_t g) {
    const auto largest = [&](Term term) { return Vec::broadcast(p.scan.largest(g, term)); };
    const Vec residual = largest(kResidual), size = largest(kSize), scale = largest(kScale),
              magnitude = largest(kMagnitude);
    const Vec relative = Vec::broadcast(kScanRounding), bias = Vec::broadcast(p.largest_bias),
              tiny = Vec::broadcast(kScanTiny), widen = Vec::broadcast(kWiden);
    for (int64_t t = 0; t < std::ssize(rows_); t += kLanes) {
      const Vec rounding = relative * (Vec::load(limits_.norm + t) * magnitude + bias) + tiny;
      const Vec most = Vec::load(limits_.norm_in + t) * residual + Vec::load(limits_.miss + t) * size +
                       Vec::load(limits_.half_l1_out + t) * scale + rounding;
      (Vec::load(limits_.tau + t) - widen * most).store(limits_.limit[g % 2] + t);
    }
  }

  // Scores the remaining candidates, first those whose lower bound is among the k largest. All rows visit the
  // codes in step, so that a code is read from memory once for all of them.
  void score() {
    for (Row& row : rows_) {
      find_best(row);
      drop_hopeless(row);
    }
    visit_candidates([](Row& row, int64_t i) {
      if (row.lower[i] < row.best) return false;
      row.upper[i] = kNone;  // scored: the second pass skips it
      return true;
    });
    visit_candidates([](Row& row, int64_t i) { return !(row.upper[i] < row.tau); });
  }

  // Scores the candidates for which choose(row, i) is true, in the order of the codes' ids.
  template <class Choose>
  void visit_candidates(Choose choose) {
    for (Row& row : rows_) row.visited = 0;
    const int64_t span = std::max<int64_t>(kScanGroup, kSpanBytes / (kDigits * sizes_.width));
    for (int64_t end = block_.c_begin + span; end < block_.c_end + span; end += span) {
      for (Row& row : rows_) {
        int64_t i = row.visited;
        for (; i < row.n && row.id[i] < end; ++i) {
          if (choose(row, i)) add(row, row.id[i]);
        }
        row.visited = i;
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
      float y = cut(static_cast<float>(sums[i]) * row.unit * score.factor[id]);
      if (score.bias != nullptr) y = cut(y + score.bias[id]);
      Candidates candidates = candidates_of(p, block_, row.token);
      if (y >= candidates.kept.threshold()) candidates.offer(y, id);
      row.tau = std::max(row.tau, candidates.kept.threshold());
    }
  }

  // Frees places in a row's buffer of candidates.
  void tighten(Row& row) {
    const int64_t room = candidate_room(p.k);
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
    // The guess is no lower bound: fewer than k may reach it, and the k best of them are wanted all the same.
    row.best = kth_lower(row.lower, row.n, row.tau > row.guess ? row.tau : kNone, p.k);
    row.tau = std::max(row.tau, row.best);
    if (row.lower_all != nullptr) {
      row.tau_all = std::max({row.tau, row.tau_all, kth_lower(row.lower_all, row.n, row.tau_all, p.k)});
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

  // Adds the codes of a group whose upper bound reaches tau to the row's candidates. approx(j): 16 approximations. Most
  // groups have none that reaches the limit, so these are not stored. Inlined: a call per group costs one token 5 %.
  template <class Approx>
  [[gnu::always_inline]] void consider(Row& row, int64_t g, const Approx& approx) {
    const Vec limit = Vec::broadcast(limits_.limit[g % 2][&row - rows_.data()]);
    uint64_t reach = 0;
#pragma GCC unroll 4
    for (int j = 0; j < kScanGroup; j += kLanes) reach |= uint64_t{Vec::not_below(approx(j), limit)} << j;
    if (reach == 0) return;

    const int64_t first = g * kScanGroup, n = std::min<int64_t>(kScanGroup, p.score.C - first);
    if (n < kScanGroup) reach &= (uint64_t{1} << n) - 1;
    const uint32_t* const mask = p.mask.bits(row.token);
    const uint64_t group_deleted = mask == nullptr ? 0 : deleted_of_group(mask, g, p.score.C);
    if (p.deleted == nullptr) reach &= ~group_deleted;
    const Vec tau = Vec::broadcast(row.tau), widen = Vec::broadcast(kWiden),
              rounding = Vec::broadcast(
                  kScanRounding * (row.norm * p.scan.largest(g, kMagnitude) + p.largest_bias) + kScanTiny);
    const float *scale = p.scan.terms_of(g, kScale), *residual = p.scan.terms_of(g, kResidual),
                *size = p.scan.terms_of(g, kSize);
    const Vec norm_in = Vec::broadcast(row.norm_in), miss = Vec::broadcast(row.miss),
              half_l1_out = Vec::broadcast(row.half_l1_out);
    for (int j = 0; j < kScanGroup; j += kLanes) {
      uint32_t lanes = reach >> j & 0xffff;
      if (lanes == 0) continue;
      const Vec error = (norm_in * Vec::load(residual + j) + miss * Vec::load(size + j) +
                         half_l1_out * Vec::load(scale + j).magnitude() + rounding) *
                        widen;
      const Vec score = approx(j), upper = score + error;
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
    if (row.n >= row.trigger) {
      tighten(row);
      limits_.tau[&row - rows_.data()] = row.tau;
    }
  }

  const SelectParams& p;
  const Block block_;
  float* const scratch_;
  const ScanScratch sizes_;
  Products products_;
  const int64_t first_group_, groups_, samples_;
  int64_t rank_ = 0;  // of the guess among them
  Row storage_[kScanTokens];
  std::span<Row> rows_;  // of storage_: those that are read
  struct alignas(64) {
    float norm_in[kScanTokens], miss[kScanTokens], half_l1_out[kScanTokens], norm[kScanTokens],
        tau[kScanTokens];
    float limit[2][kScanTokens];  // in the group that is read, and in that before it
  } limits_;                      // of rows_, in their order
  int64_t exact_[kScanTokens];    // tokens for the exact scan
  int64_t exact_n_ = 0;
  Row* batch_row_[4];
  int32_t batch_id_[4];
  int64_t batch_ = 0;
};

}  // namespace

void select_scan(const SelectParams& p, const Block& block, float* scratch) {
  Scan<Products>(p, block, scratch).run();
}
