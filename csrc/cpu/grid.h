// How T tokens and C codes are cut into blocks, and how threads share the blocks. Pure functions. The cut
// changes the time, never the results.

#pragma once

#include <algorithm>
#include <cstdint>

#include "core/sum16.h"
#include "core/params.h"
#include "core/scan.h"

namespace cu_fast {

// Tokens per block: so many rows use each tile of codes that is read into the cache.
inline constexpr int64_t kBlockTokens = 128;
// With fewer tokens than this per thread, threads share out the codes rather than the tokens.
inline constexpr int64_t kFairTokens = 16;
// The same of the scan on matrix tiles: of more tokens per read of the plane. From a prototype; not measured here.
inline constexpr int64_t kFairTileTokens = 64;
// Codes per tile: their words in kChunk columns, 24 KiB, stay in the L1 cache (fixed-inl.h).
inline constexpr int64_t kTileCodes = 32;
// Codes that justify a part of their own.
inline constexpr int64_t kPartCodes = 256;
// Multiplications that justify waking a thread.
inline constexpr int64_t kMinWork = 256 * 1024;

// So many rows of x are not rounded up to the 16 of a tile (fixed_tiles-inl.h).
inline constexpr int64_t kSingleRows = 3;

// From one row of x that has become integers to the next, in int16: three words per column, and a cache line, so that
// rows of a power of two do not compete for the same lines of a cache.
inline int64_t fixed_words(int64_t width) {
  return 3 * width + 32;
}

// Scratch per thread: a row of x, widened, and the rows of a block as integers.
inline int64_t scratch_floats(const ScoreParams& p) {
  const int64_t tokens = std::min(p.T, kBlockTokens),
                rows = tokens > kSingleRows ? round_up(tokens, kLanes) : tokens;
  return digit_width(p.E) + rows * fixed_words(digit_width(p.E)) / 2;
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
inline Grid plan_grid(int64_t T, int64_t C, int64_t E, int64_t threads, int64_t most_tokens = kBlockTokens,
                      int64_t fair_tokens = kFairTokens) {
  const int64_t work_of_token = C * std::max<int64_t>(E, 1);
  const int64_t share = std::clamp((T + threads - 1) / threads, fair_tokens, most_tokens);
  int64_t blocks = (T + share - 1) / share;
  const int64_t block_tokens = round_up((T + blocks - 1) / blocks, 4);  // rows go in groups of 4
  blocks = (T + block_tokens - 1) / block_tokens;

  const int64_t most_parts =
      std::max<int64_t>(1, std::min(block_tokens * work_of_token / kMinWork, C / kPartCodes));
  int64_t parts = 1;
  while (parts < most_parts && blocks * parts % threads != 0 && blocks * parts < 4 * threads) ++parts;
  const int64_t part_codes = round_up((C + parts - 1) / parts, kScanGroup);
  parts = (C + part_codes - 1) / part_codes;

  const int64_t workers = std::min({threads, blocks * parts, 1 + T * work_of_token / kMinWork});
  return {T, C, block_tokens, blocks, part_codes, parts, workers};
}

}  // namespace cu_fast
