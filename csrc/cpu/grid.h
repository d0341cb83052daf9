// How T tokens and C codes are cut into blocks, and how threads share the blocks. Pure functions. The cut
// changes the time, never the results.

#pragma once

#include <algorithm>
#include <cstdint>

#include "core/canonical.h"
#include "core/params.h"
#include "core/scan.h"

namespace cu_fast {

// Tokens per block: so many rows use each tile of codes that is read into the cache.
inline constexpr int64_t kBlockTokens = 64;
// With fewer tokens than this per thread, threads share out the codes rather than the tokens.
inline constexpr int64_t kFairTokens = 16;
// The most codes per tile: their scores with kTokens <= 4 rows, 4 KiB, stay in the L1 cache.
inline constexpr int64_t kMaxTileCodes = 256;
// Floats per tile of codes: 256 KiB, to stay in the L2 cache.
inline constexpr int64_t kTileFloats = 64 * 1024;
// Multiplications that justify waking a thread.
inline constexpr int64_t kMinWork = 256 * 1024;

inline int64_t tile_codes(int64_t E) {
  return std::clamp(kTileFloats / std::max<int64_t>(E, 1) / kLanes * kLanes, int64_t{kLanes}, kMaxTileCodes);
}

// Up to this many tokens the time is that of reading the codes, and codes are widened as they are read. With
// more tokens, a tile of codes is widened once for all of them.
inline constexpr int64_t kFewTokens = 8;

// Whether codes are scored one at a time. That is a single stream of memory, which the hardware prefetches
// better than several in one page. Only while the rows of z stay in the L1 cache: 8 x 512 floats are 16 KiB.
inline bool takes_codes_one_by_one(const ScoreParams& p) {
  return p.T <= kFewTokens && p.E <= 512;
}

// Whether codes are read in place, rather than from a widened, padded tile.
inline bool reads_codes_in_place(const ScoreParams& p) {
  return p.E % kLanes == 0 && (p.codes.dtype == Dtype::f32 || p.T <= kFewTokens);
}

// Scratch per thread: the rows of z of a block, and a tile of codes, widened and padded to a multiple of 16.
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

  // Blocks of one part are consecutive, so that a thread finds their codes in its cache.
  Block block(int64_t index) const {
    const int64_t part = index / token_blocks, t = index % token_blocks * block_tokens;
    return {t, std::min(T, t + block_tokens), part * part_codes, std::min(C, (part + 1) * part_codes), part};
  }
};

// Splits the tokens into blocks, none so small that reading all codes for it is wasteful. Splits the codes
// into parts too, if there are too few blocks of tokens to keep all threads busy.
inline Grid plan_grid(int64_t T, int64_t C, int64_t E, int64_t threads, int64_t most_tokens = kBlockTokens) {
  const int64_t work_of_token = C * std::max<int64_t>(E, 1);
  const int64_t share = std::clamp((T + threads - 1) / threads, kFairTokens, most_tokens);
  int64_t blocks = (T + share - 1) / share;
  const int64_t block_tokens = round_up((T + blocks - 1) / blocks, 4);  // rows go in groups of 4
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
