// The k best codes of each token, by scoring every code.
//
//   score(t, j) = (<q_t, p_j> unit_t) factor_j [+ bias_j]       core/fixed.h; q of z_t - pre
//
//   what           shape                         layout
//   z              [T, E]                        any stride, fp32, bf16 or fp16
//   digits         [C, 3, W]                     core/fixed.h
//   kept, deleted  [T, parts, capacity] keys     heaps (core/order.h), the worst key on top
//
// 1. visit_sums computes the integers.
// 2. offer_tile applies the epilogue to 16 scores at a time and compares them once with the k-th best so far.
//    A code that reaches it enters the token's heap `kept`. A deleted code that reaches it enters the heap
//    `deleted`, if hits are counted.
// 3. select_finish (codebook_quantize.cpp) sorts and writes, when all parts of the codes are done.
//
// Keys are totally ordered, so the order of visits does not change the result. The certified scan fills the
// same heaps without scoring every code: codebook_quantize_scan-inl.h.
//
// Included inside the namespace and the target region of one instruction set, which supplies Vec.

namespace {

// The heaps of one token and part, and the token's mask.
struct Candidates {
  KeyHeap kept, deleted;
  const uint32_t* mask;

  void offer(float score, int64_t code) {
    if (!(score <= std::numeric_limits<float>::max())) return;  // +Inf; the threshold drops -Inf and NaN
    const uint64_t key = key_of(score, static_cast<int32_t>(code));
    if (!is_deleted(mask, code)) {
      kept.push(key);
    } else if (deleted.keys != nullptr) {
      deleted.push(key);
    }
  }
};

// Offers codes [first, first + n), given their sums.
void offer_tile(const ScoreParams& p, Candidates& candidates, float unit, int64_t first, int64_t n,
                const int64_t* sums) {
  Vec threshold = Vec::broadcast(candidates.kept.threshold());
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t at = first + j;
    const Vec score =
        scores_of(sums + j, unit, p.factor + at, p.bias == nullptr ? nullptr : p.bias + at, n - j);
    uint32_t pass = Vec::at_least(score, threshold);
    if (n - j < kLanes) pass &= (1u << (n - j)) - 1;
    if (pass == 0) continue;
    float lanes[kLanes];
    score.store(lanes);
    for (; pass != 0; pass &= pass - 1) {
      const int lane = std::countr_zero(pass);
      candidates.offer(lanes[lane], at + lane);
    }
    threshold = Vec::broadcast(candidates.kept.threshold());
  }
}

Candidates candidates_of(const SelectParams& p, const Block& block, int64_t token) {
  const int64_t place = (token * p.parts + block.part) * p.capacity;
  uint64_t* const deleted = p.deleted == nullptr ? nullptr : p.deleted + place;
  return {{p.kept + place, p.capacity}, {deleted, p.capacity}, p.mask.bits(token)};
}

void start_heaps(Candidates candidates, bool poisoned) {
  candidates.kept.clear(poisoned);
  if (candidates.deleted.keys != nullptr) candidates.deleted.clear(poisoned);
}

}  // namespace

void select_exact(const SelectParams& p, const Block& block, float* scratch) {
  visit_sums(
      p.score, block, scratch,
      [&](int64_t token, bool finite) { start_heaps(candidates_of(p, block, token), !finite); },
      [&](int64_t token, float unit, int64_t first, int64_t n, const int64_t* sums) {
        Candidates candidates = candidates_of(p, block, token);
        offer_tile(p.score, candidates, unit, first, n, sums);
      });
}
