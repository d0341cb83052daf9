// What the kernel of delete_latents is given beside its parameters: which steps, and memory.

#pragma once

#include <algorithm>
#include <cstdint>

#include "core/sum16.h"
#include "core/params.h"
#include "cpu/grid.h"

namespace cu_fast {

// The most tokens of a block: each latent's row is read from memory once for so many.
inline constexpr int64_t kLatentTokens = kBlockTokens;

// score: pre and sigma of tokens. apply: the rest, from these. Both at once where a block has whole masks.
enum class LatentStep { score, apply, both };

// What lies between the steps.
struct LatentScores {
  float* pre;    // [tokens, round_up(M, 16)]
  float* sigma;  // [tokens], not finite: the token is NaN

  LatentScores from_token(int64_t t, int64_t M) const { return {pre + t * round_up(M, kLanes), sigma + t}; }
};

// The scratch of one worker: where each array starts, in floats.
struct LatentScratch {
  int64_t tokens, width, listed;

  explicit LatentScratch(const DeleteLatentsParams& p)
      : tokens(std::min(p.T, kLatentTokens)), width(digit_width(p.Din)), listed(round_up(p.M, kLanes)) {}

  int64_t x() const { return 0; }                // [width], a row: rho x
  int64_t fixed() const { return x() + width; }  // int16 [tokens, fixed_words(width)], as integers
  int64_t pre() const {
    return fixed() + tokens * fixed_words(width) / 2;
  }  // [tokens, listed], of LatentStep::both
  int64_t sigma() const { return pre() + tokens * listed; }           // [tokens], likewise
  int64_t ids() const { return sigma() + round_up(tokens, kLanes); }  // int32 [listed], a mask's latents
  int64_t factor() const { return ids() + listed; }                   // [listed], theirs
  int64_t bias() const { return factor() + listed; }                  // [listed], theirs
  int64_t least() const { return bias() + listed; }                   // [listed], max(theta, 0)
  int64_t slots() const { return least() + listed; }                  // DecodeSlot [listed]
  int64_t size() const { return slots() + 2 * listed; }
};

}  // namespace cu_fast
