// The products of the scan on the CPU's matrix tiles.
//
//   q_t ~ step (low_t + base high_t)     sums[t][j] = <low_t, c_j>     high sums[t][j] = <high_t, c_j>
//
//   what             shape                           layout, and where it stays
//   a row            [stride] bytes                  low bytes [W], then its start, 16 times; likewise high: L2 cache
//   group of codes   [scan_width(E) / 4, 64, 4]      as it lies: 4 entries of 16 codes are a row of a tile
//   sums, high sums  [2, kTileTokens, 64] int32      L1 cache; of these and of the kTileTokens rows before
//
// 1. take      Copies rows behind each other, padded with zeros to whole tiles. Where many have outliers, or rows are long,
//              all of them get high bytes: the two highest digits of q. They are exact up to the third one, which leaves
//              fewer candidates, and cost a second product.
// 2. multiply  kTileTokens rows at a time. While the tiles are at work, what they computed before is used.
// 3. finish    Uses what is left.
//
// Rows are signed and codes unsigned. A sum begins with its row's start, which takes away the offset of the codes. The last
// tile of codes of a group may reach into the groups behind, where rows have zeros; one that would reach behind the plane
// is copied.
//
// Included inside the namespace and the target region of one instruction set, which supplies Tiles, after scan-inl.h.

namespace {

constexpr int64_t kTileTokens = 32;

// So few rows are multiplied one by one.
constexpr int64_t kFewRows = 7;

// Rows so long get high bytes in any case: scoring a candidate takes long, too.
constexpr int64_t kLongRow = 2048;

// Bytes of a group: four columns of it, from which one row of a tile to the next; and 64 columns.
constexpr int64_t kTileStride = 4 * kScanGroup, kStepBytes = 16 * kTileStride;

// 32 rows against 64 codes: sums [32, 64]. `last` is where the last of the `steps` of 64 columns lies. Reads the cache lines
// of `ahead` meanwhile, `lines` per step.
inline void multiply_32(const int8_t* rows, int64_t width, int64_t stride, const uint8_t* codes,
                        const uint8_t* last, const uint8_t* ahead, int lines, int32_t* sums) {
  constexpr int64_t kRow = kScanGroup * sizeof(int32_t);
  const int64_t steps = width / 64;
  const int8_t* const below = rows + 16 * stride;
  for (int half = 0; half < 2;
       ++half, codes += kTileStride / 2, last += kTileStride / 2, sums += kScanGroup / 2) {
    Tiles::load<0>(rows + width, stride), Tiles::load<1>(rows + width, stride);
    Tiles::load<2>(below + width, stride), Tiles::load<3>(below + width, stride);
    for (int64_t s = 0; s < steps; ++s) {
      const uint8_t* const code = s + 1 < steps ? codes + s * kStepBytes : last;
      Tiles::load<6>(code, kTileStride);
      Tiles::load<4>(rows + s * 64, stride);
      Tiles::add_unsigned<0, 4, 6>();
      Tiles::load<7>(code + 64, kTileStride);
      Tiles::add_unsigned<1, 4, 7>();
      Tiles::load<5>(below + s * 64, stride);
      Tiles::add_unsigned<2, 5, 6>();
      Tiles::add_unsigned<3, 5, 7>();
      for (int i = 0; i < lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
    Tiles::store<0>(sums, kRow), Tiles::store<1>(sums + 16, kRow);
    Tiles::store<2>(sums + 16 * kScanGroup, kRow), Tiles::store<3>(sums + 16 * kScanGroup + 16, kRow);
  }
}

// 16 rows.
inline void multiply_16(const int8_t* rows, int64_t width, int64_t stride, const uint8_t* codes,
                        const uint8_t* last, int32_t* sums) {
  constexpr int64_t kRow = kScanGroup * sizeof(int32_t);
  const int64_t steps = width / 64;
  Tiles::load<0>(rows + width, stride), Tiles::load<1>(rows + width, stride);
  Tiles::load<2>(rows + width, stride), Tiles::load<3>(rows + width, stride);
  for (int64_t s = 0; s < steps; ++s) {
    const uint8_t* const code = s + 1 < steps ? codes + s * kStepBytes : last;
    Tiles::load<4>(rows + s * 64, stride);
    Tiles::load<5>(code, kTileStride);
    Tiles::add_unsigned<0, 4, 5>();
    Tiles::load<6>(code + 64, kTileStride);
    Tiles::add_unsigned<1, 4, 6>();
    Tiles::load<7>(code + 128, kTileStride);
    Tiles::add_unsigned<2, 4, 7>();
    Tiles::load<5>(code + 192, kTileStride);
    Tiles::add_unsigned<3, 4, 5>();
  }
  Tiles::store<0>(sums, kRow), Tiles::store<1>(sums + 16, kRow);
  Tiles::store<2>(sums + 32, kRow), Tiles::store<3>(sums + 48, kRow);
}

class TileProducts {
 public:
  TileProducts(const SelectParams& params, const ScanScratch& sizes, float* scratch)
      : p(params),
        few_(params, sizes, scratch),
        width_(sizes.width),
        stride_(sizes.tile_stride()),
        low_(reinterpret_cast<int8_t*>(scratch + sizes.tiles())),
        high_(low_ + round_up(sizes.rows, kTileTokens) * stride_),
        plane_end_(params.scan.group(scan_groups(params.score.C), params.score.E)) {}

  void take(std::span<Row> rows) {
    rows_ = rows;
    const int64_t n = std::ssize(rows);
    if (!are_two_bytes_ && n > kFewRows) {
      const auto have_outliers =
          std::count_if(rows.begin(), rows.end(), [](const Row& row) { return row.outlier_count > 0; });
      are_two_bytes_ = width_ >= kLongRow || 4 * have_outliers > n;
      for (int64_t t = 0; are_two_bytes_ && t < n; ++t) refine(rows[t]);
    }
    few_.take(rows);
    if (!on_tiles()) return;
    for (int64_t t = 0; t < round_up(n, kTileTokens); ++t) {
      int8_t *const low = low_ + t * stride_, *const high = high_ + t * stride_;
      if (t >= n) {
        std::fill_n(low, width_ + 64, int8_t{0}), std::fill_n(high, width_ + 64, int8_t{0});
        continue;
      }
      const Row& row = rows[t];
      if (are_two_bytes_) {
        for (int64_t e = 0; e < width_; e += 64) {
          std::copy_n(digits_of(row) + 3 * e, 64, high + e);
          std::copy_n(digits_of(row) + 3 * e + 64, 64, low + e);
        }
        std::fill_n(reinterpret_cast<int32_t*>(high + width_), kLanes, row.outlier_start);
      } else {
        int8_t* const end = std::copy_n(row.bytes, round_up(p.score.E, kLanes), low);
        std::fill(end, low + width_, int8_t{0});
      }
      std::fill_n(reinterpret_cast<int32_t*>(low + width_), kLanes, row.start);
    }
  }

  template <class Use>
  void multiply(int64_t g, const Use& use) {
    if (!on_tiles()) return few_.multiply(g, use);
    const int64_t n = std::ssize(rows_), blocks = (n + kTileTokens - 1) / kTileTokens;
    const int64_t steps = width_ / 64;
    const uint8_t* const codes = p.scan.group(g, p.score.E);
    const uint8_t *const behind = codes + scan_width(p.score.E) * kScanGroup,
                         *last = codes + (steps - 1) * kStepBytes;
    if (last + kStepBytes > plane_end_) {
      std::copy(last, behind, end_);
      last = end_;
    }
    // The group behind this one: each block of tokens reads its share of the lines, in two halves.
    const int lines = blocks > 1 ? static_cast<int>(32 / blocks) : 0;
    const uint8_t* ahead = behind;
    for (int64_t t = 0; t < n; t += kTileTokens, ahead += 2 * steps * lines * 64) {
      Sums& sums = sums_[turn_];
      multiply_rows(low_ + t * stride_, n - t, codes, last, ahead, lines, sums.low);
      if (are_two_bytes_) multiply_rows(high_ + t * stride_, n - t, codes, last, ahead, 0, sums.high);
      finish(use);
      pending_ = {g, t};
      turn_ ^= 1;
    }
  }

  template <class Use>
  void finish(const Use& use) {
    const auto [g, first] = std::exchange(pending_, {-1, 0});
    if (g < 0) return;
    const Sums& sums = sums_[turn_ ^ 1];
    const int64_t rows = std::min(kTileTokens, std::ssize(rows_) - first);
    for (int64_t r = 0; r < rows; ++r) {
      Row& row = rows_[first + r];
      if (row.gives_up) continue;
      const int32_t* high = are_two_bytes_ ? sums.high + r * kScanGroup : nullptr;
      alignas(64) int32_t sparse[kScanGroup];
      if (!are_two_bytes_ && row.outlier_count > 0) {
        outlier_dots(row, p.scan.group(g, p.score.E), sparse);
        high = sparse;
      }
      use(row, g, sums.low + r * kScanGroup, high);
    }
  }

 private:
  struct alignas(64) Sums {
    int32_t low[kTileTokens * kScanGroup], high[kTileTokens * kScanGroup];
  };

  // Those that were given two bytes are multiplied on tiles, however few they have become.
  bool on_tiles() const { return are_two_bytes_ || std::ssize(rows_) > kFewRows; }

  // The digits of q, as Pair takes them: 64 of each in turn, the highest first.
  static const int8_t* digits_of(const Row& row) { return reinterpret_cast<const int8_t*>(row.fixed); }

  // q ~ 256 (d_1 + 256 d_0). A digit that is not zero makes no entry larger than about twice q, so the roundings of the two
  // sums are relative to the norm, as core/scan.h has it.
  void refine(Row& row) const {
    int64_t squares = 0;
    row.start = row.outlier_start = 0;
    for (int64_t e = 0; e < width_; e += 64) {
      const int8_t* const d = digits_of(row) + 3 * e;
      for (int i = 0; i < 64; ++i) {
        row.outlier_start -= kOffset * d[i];
        row.start -= kOffset * d[64 + i];
        squares += int32_t{d[128 + i]} * d[128 + i];
      }
    }
    row.base = 256;
    row.step = row.base * row.unit;
    row.norm_in = row.norm;
    row.miss = std::max(std::sqrt(static_cast<float>(squares)) * (1.0f + 0x1p-20f), 1.0f) * row.unit;
    row.half_l1_out = 0;
    row.outlier_count = 0;
  }

  void multiply_rows(const int8_t* rows, int64_t n, const uint8_t* codes, const uint8_t* last,
                     const uint8_t* ahead, int lines, int32_t* sums) const {
    if (n > 16) {
      multiply_32(rows, width_, stride_, codes, last, ahead, lines, sums);
    } else {
      multiply_16(rows, width_, stride_, codes, last, sums);
    }
  }

  const SelectParams& p;
  const Tiles tiles_;
  RowProducts few_;
  const int64_t width_, stride_;
  int8_t *const low_, *const high_;
  const uint8_t* const plane_end_;
  alignas(64) uint8_t end_[kStepBytes] = {};  // the last 64 columns of a group, if they are not whole
  std::span<Row> rows_;
  bool are_two_bytes_ = false;
  Sums sums_[2];
  int turn_ = 0;  // of sums_: which is written next
  struct {
    int64_t g, first;
  } pending_ = {-1, 0};
};

}  // namespace
