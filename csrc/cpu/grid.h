// How T tokens and C codes are cut into blocks, and blocks into shares of the threads. Pure functions:
// results never depend on the cut, only the time does.

#pragma once

#include <algorithm>
#include <cstdint>

#include "core/canonical.h"
#include "core/params.h"
#include "core/scan.h"

namespace cu_fast {

// Tokens of a block: each tile of codes that is read into the cache serves as many rows.
inline constexpr int64_t kBlockTokens = 64;
// Fewer than this, and threads share the codes rather than the tokens.
inline constexpr int64_t kFairTokens = 16;
// Codes of a tile, at most: the scores of a few rows against a tile stay in the first-level cache.
inline constexpr int64_t kMaxTileCodes = 256;
// Floats of a tile of codes: 256 KiB, a quarter or more of a second-level cache.
inline constexpr int64_t kTileFloats = 64 * 1024;
// Multiplications that are worth waking a thread for.
inline constexpr int64_t kMinWork = 256 * 1024;

inline int64_t tile_codes(int64_t E) {
  return std::clamp(kTileFloats / std::max<int64_t>(E, 1) / kLanes * kLanes, int64_t{kLanes}, kMaxTileCodes);
}

// With so few tokens memory is the bound: codes are widened as they are read. With more, a tile of codes is
// widened once for all of them.
inline constexpr int64_t kFewTokens = 8;

// Whether codes pass by one after the other: a single stream, which hardware prefetches better than several
// that share a page. Only while the rows of z that they pass stay in the first-level cache.
inline bool takes_codes_one_by_one(const ScoreParams& p) {
  return p.T <= kFewTokens && p.E <= 512;
}

// Whether codes are read where they lie, or from a widened, padded tile.
inline bool reads_codes_in_place(const ScoreParams& p) {
  return p.E % kLanes == 0 && (p.codes.dtype == Dtype::f32 || p.T <= kFewTokens);
}

// What one thread needs for a block: its rows of z, and a tile of codes, widened and padded to whole lanes.
inline int64_t scratch_floats(const ScoreParams& p) {
  const int64_t tile = reads_codes_in_place(p) ? 0 : tile_codes(p.E);
  return (std::min(p.T, kBlockTokens) + tile) * round_up(p.E, kLanes);
}

struct Grid {
  int64_t T, C;
  int64_t block_tokens, token_blocks;
  int64_t part_codes, parts;
  int64_t workers;

  int64_t size() const { return token_blocks * parts; }

  // Blocks of one part are neighbours: a thread keeps its codes in the cache.
  Block block(int64_t index) const {
    const int64_t part = index / token_blocks, t = index % token_blocks * block_tokens;
    return {t, std::min(T, t + block_tokens), part * part_codes, std::min(C, (part + 1) * part_codes), part};
  }
};

// Splits the tokens when each thread gets enough of them to make reading all codes worth it. Splits the codes
// too when the blocks of tokens would leave threads idle.
inline Grid plan_grid(int64_t T, int64_t C, int64_t E, int64_t threads, int64_t most_tokens = kBlockTokens) {
  const int64_t work_of_token = C * std::max<int64_t>(E, 1);
  const int64_t share = std::clamp((T + threads - 1) / threads, kFairTokens, most_tokens);
  int64_t blocks = (T + share - 1) / share;
  const int64_t block_tokens = round_up((T + blocks - 1) / blocks, 4);  // whole groups of rows
  blocks = (T + block_tokens - 1) / block_tokens;

  const int64_t most_parts =
      std::max<int64_t>(1, std::min(block_tokens * work_of_token / kMinWork, C / kMaxTileCodes));
  int64_t parts = 1;
  while (parts < most_parts && blocks * parts % threads != 0 && blocks * parts < 4 * threads) ++parts;
  const int64_t part_codes = round_up((C + parts - 1) / parts, kScanGroup);
  parts = (C + part_codes - 1) / part_codes;

  const int64_t workers = std::min({threads, blocks * parts, 1 + T * work_of_token / kMinWork});
  return {T, C, block_tokens, blocks, part_codes, parts, workers};
}

}  // namespace cu_fast
