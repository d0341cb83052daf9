// The end of a bottleneck on the CPU: a selection, its weights, and a decoding.

#include <vector>

#include "core/mask.h"
#include "host/cpu.h"

namespace cu_fast {
namespace {

// Turns the scores of a selection into its weights: relu(score), or 1. An empty slot keeps its 0, or its NaN,
// which tells the decoder that the row was faulty. Returns how many of the codes are deleted.
int64_t weigh(const SelectParams& p, bool score_weights, const Mask& mask) {
  int64_t taken = 0;
  for (int64_t t = 0; t < p.score.T; ++t) {
    const uint32_t* const bits = mask.bits(t);
    for (int64_t i = t * p.k; i < (t + 1) * p.k; ++i) {
      if (p.ids[i] < 0) continue;
      p.scores[i] = !score_weights ? 1.0f : p.scores[i] > 0 ? p.scores[i] : 0.0f;
      taken += is_deleted(bits, p.ids[i]);
    }
  }
  return taken;
}

}  // namespace

void Cpu::bottleneck(SelectParams p, bool counts_hits, bool score_weights, DecodeParams decode,
                     int64_t* receipt) const {
  const int64_t T = p.score.T;
  Tensor scores = empty({T, p.k}, ScalarType::Float), ids = empty({T, p.k}, ScalarType::Int);
  std::vector<int32_t> hits(counts_hits ? T : 0);
  p.scores = scores.mutable_data_ptr<float>();
  p.ids = ids.mutable_data_ptr<int32_t>();
  p.hits = counts_hits ? hits.data() : nullptr;
  select(p, counts_hits);
  int64_t taken = weigh(p, score_weights, decode.mask);
  for (int32_t h : hits) taken += h;
  decode.ids = p.ids;
  decode.weights = p.scores;
  this->decode(decode);
  if (receipt == nullptr) return;
  receipt[0] += T;
  receipt[1] += taken;
}

}  // namespace cu_fast
