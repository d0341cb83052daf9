// The k-th largest of n words, by a block of kThreads: a radix select, 8 bits at a time.
//
// 1. Up to kHeld words per thread are loaded at once, and stay in registers if these are all. 0 does not count.
// 2. Count, by their next 8 bits, the words that begin with the prefix found so far.
// 3. The first warp finds the digit that the k-th largest has, and appends it to the prefix.
// 4. Who only wants to know which words are the k largest stops where all that begin so are among them.

#pragma once

#include <bit>
#include <utility>

#include "cuda/device.h"
#include "cuda/fixed.h"
#include "cuda/select.h"

namespace cu_fast {

// Words that a block holds in registers.
inline constexpr int kHeldWords = SelectTuning::kHeld * kThreads;

struct KthShared {
  int32_t count[256];
  uint64_t prefix;
  int32_t left;
  int32_t whole;  // whether all that begin with the prefix are among the k
};

// Maps floats to integers in the same order. NaN and -inf become 0.
CU_FAST_DEVICE uint32_t word_of(float x) {
  if (!(x >= -3.402823466e38f)) return 0;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

CU_FAST_DEVICE float float_of(uint32_t word) {
  return std::bit_cast<float>(word >> 31 ? word & 0x7fffffffu : ~word);
}

CU_FAST_DEVICE uint64_t word_of(uint64_t key) {
  return key;
}

// word_of(value(i)) for i in [0, n), each in one thread. Values are loaded first, so that no load waits for a word.
template <class Value>
class Words {
 public:
  using Loaded = decltype(std::declval<Value>()(int64_t{}));
  using Word = decltype(word_of(std::declval<Loaded>()));

  CU_FAST_DEVICE Words(int64_t n, const Value& value) : n_(n), value_(value) {}

  // Calls use(word) for those that count.
  template <class Use>
  CU_FAST_DEVICE void each(const Use& use) {
#pragma unroll 1
    for (int64_t first = 0; first < n_; first += kHeldWords) {
      if (first != first_) load(first);
#pragma unroll
      for (int i = 0; i < SelectTuning::kHeld; ++i) {
        if (words_[i] != 0) use(words_[i]);
      }
    }
  }

 private:
  CU_FAST_DEVICE void load(int64_t first) {
    first_ = first;
    const int left = n_ - first < kHeldWords ? static_cast<int>(n_ - first) : kHeldWords;
    Loaded loaded[SelectTuning::kHeld];
    // Of a value that does not exist the first one is loaded, so that no load waits for a branch.
#pragma unroll
    for (int i = 0; i < SelectTuning::kHeld; ++i) {
      const int at = i * kThreads + thread_index();
      loaded[i] = value_(first + (at < left ? at : 0));
    }
#pragma unroll
    for (int i = 0; i < SelectTuning::kHeld; ++i) {
      words_[i] = i * kThreads + thread_index() < left ? word_of(loaded[i]) : 0;
    }
  }

  const int64_t n_;
  const Value& value_;
  int64_t first_ = -1;  // of those that are held
  Word words_[SelectTuning::kHeld];
};

// The k-th largest word, returned to every thread of the block; 0 if there are fewer. If not kExact, any number that
// the k largest reach and no other: words that differ.
template <bool kExact, class Value>
CU_FAST_DEVICE auto kth_word(Words<Value>& words, int64_t k, KthShared& shared) {
  using Word = typename Words<Value>::Word;
  constexpr int kTop = 8 * sizeof(Word) - 8;
  Word prefix = 0;
  // The k-th largest is the left-th largest of those that begin with the prefix.
  int32_t left = static_cast<int32_t>(k);
#pragma unroll 1
  for (int shift = kTop; shift >= 0; shift -= 8) {
    shared.count[thread_index()] = 0;
    sync_block();
    words.each([&](Word word) {
      if ((word ^ prefix) >> shift >> 8 == 0) atomic_add(&shared.count[word >> shift & 255], 1);
    });
    sync_block();
    if (warp_index() == 0) {
      // Each lane has 8 of the 256 counts. Higher lanes have the larger digits, which count first.
      int32_t mine = 0;
      for (int i = 0; i < 8; ++i) mine += shared.count[8 * lane_index() + i];
      int32_t from_here = mine;
      for (int step = 1; step < 32; step *= 2) {
        const int32_t above = shuffle(from_here, (lane_index() + step) % 32);
        if (lane_index() + step < 32) from_here += above;
      }
      const uint32_t reach = ballot(from_here >= left);
      if (reach == 0) {
        if (lane_index() == 0) shared.left = 0;
      } else if (lane_index() == 31 - count_leading_zeros(reach)) {
        int32_t rest = left - (from_here - mine);
        int digit = 8 * lane_index() + 7;
        while (shared.count[digit] < rest) rest -= shared.count[digit--];
        shared.prefix = prefix | Word{static_cast<uint32_t>(digit)} << shift;
        shared.left = rest;
        shared.whole = shared.count[digit] == rest;
      }
    }
    sync_block();
    left = shared.left;
    if (left == 0) return Word{0};
    prefix = static_cast<Word>(shared.prefix);
    if (!kExact && shared.whole != 0) break;
  }
  return prefix;
}

// The k-th largest of value(i), i in [0, n), returned to every thread of the block. NaN and -inf do not
// count; -inf if fewer than k are left.
template <class Value>
CU_FAST_DEVICE float kth_largest(int64_t n, int64_t k, const Value& value, KthShared& shared) {
  Words words(n, value);
  const uint32_t kth = kth_word<true>(words, k, shared);
  return kth == 0 ? -INFINITY : float_of(kth);
}

}  // namespace cu_fast
