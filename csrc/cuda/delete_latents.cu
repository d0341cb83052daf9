// Deletion from a hidden state that is kept: y_t = residual_t + sigma sum_i change_i dec_i. One launch.
//
//   pre_i = score(rho x_t, enc_i) + bias_i      core/fixed.h
//   A latent of the token's mask fires where pre_i > max(theta_i, 0) and (pre_i, i) is not below the token's
//   floor.
//
//   what         shape                             where it stays
//   x, residual  [T, Din], [T, Dout], any stride   fp32, bf16 or fp16; x is read two to five times: L1
//   enc          int8 [R, 3, W]                    in place: the rows of masks: L2
//   dec          fp32 [R, Dout]                    in place: the rows that change: L2
//   rho x        [kTokens, 3, kStage] int8         shared, kStage entries at a time: any Din will do
//   pre          [kTokens, kMost]                  shared
//   y            [T, Dout]                         contiguous, residual's dtype
//
// One block per kTokens neighbouring tokens, each of which has its own mask.
// 1. Per token: whether x is finite; rho and sigma; the unit of rho x, from its largest magnitude, which is rho
//    times that of x.
// 2. pre, by a quad (cuda/fixed.h) per pair of token and latent. The quads of a block's tokens and one
//    place in their lists are neighbours in a warp: under the same mask one read of enc serves them all.
// 3. Which latents fire, how many, and whether idle values count.
// 4. Token by token. Where nothing fired the residual's bits are copied. Else the first warp lists what
//    changes, in the mask's order, and a thread adds up four columns. The squares for the dose go through
//    shared memory to the first warp, which adds them (core/sum16.h) while the others are at the next columns.
//
// What bounds it (inferred, not measured), with 512 tokens, Din = Dout = 4096 and 20 latents per mask on an
// H100: a block reads 240 KiB of enc from L2. With a token per block that is 120 MiB, some 25 us; with four
// per block 30 MiB, less than reading x and writing y takes. So many tokens go four to a block. Few tokens wait
// for memory: 3 kLoads reads of enc are in flight per thread.

#include "cuda/fix_rows.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace cu_fast {
namespace {

inline constexpr int kSlots = 256;
inline constexpr int kRowsInFlight = 8;  // of dec
inline constexpr int kLoads = 4;         // steps of enc in flight

// kMost latents at most in a mask.
template <int kTokensPerBlock, int kBlockThreads, int kMost>
struct DeleteShared {
  static constexpr int kTokens = kTokensPerBlock, kBlock = kBlockThreads;
  static constexpr int kStage = 4 * kBlock;  // columns that the block works on at a time, four per thread
  // A row of them is 16 floats more than a multiple of the 32 banks: the two quads that a 128-bit read serves
  // at a time read different banks.
  static constexpr int kStride = kStage + 16;
  static constexpr int kSharers = kBlock / kTokens;  // threads per token, whole warps

  alignas(16) float pre[kTokens][kMost];
  alignas(16) float rows[kTokens < 2 ? 2 : kTokens][kStride];
  DecodeSlot slots[kSlots];  // the latents that change, and by how much
  int32_t used;
  uint32_t faulty, idles;  // bits: the token is NaN; its idle values count
  int32_t mask[kTokens];   // -1: none, or one that does not exist
  int32_t listed[kTokens], hits[kTokens];
  float mean[kTokens], rho[kTokens], sigma[kTokens];
  float largest[kBlock / 32];           // of x, in the share of each warp
  float power[kTokens], unit[kTokens];  // of rho x; unit: NaN where it cannot be scored

  // The digits of a stage of rho x, in the memory of the rows.
  CU_FAST_DEVICE int8_t* digits(int t) { return reinterpret_cast<int8_t*>(rows[t]); }
};

// Adds the 16 partials of a quad (core/sum16.h), four per thread: l = 4 q .. 4 q + 3. All four threads get
// the sum. All lanes of the warp take part.
CU_FAST_DEVICE float quad_sum(const float (&partial)[4]) {
  float sum[4];
#pragma unroll
  for (int l = 0; l < 4; ++l) {
    sum[l] = add(partial[l], shuffle_xor(partial[l], 2));
    sum[l] = add(sum[l], shuffle_xor(sum[l], 1));
  }
  return add(add(sum[0], sum[2]), add(sum[1], sum[3]));
}

CU_FAST_DEVICE float4 squared(float4 x) {
  return make_float4(multiply(x.x, x.x), multiply(x.y, x.y), multiply(x.z, x.z), multiply(x.w, x.w));
}

// Adds a row of at most kStage terms in shared memory to the partials that this thread of a quad has.
template <int kStage>
CU_FAST_DEVICE void add_terms(float (&partial)[4], const float* row, int64_t width) {
  const int q = thread_index() % 4;
#pragma unroll 8
  for (int e = 0; e < kStage && e < width; e += kLanes) {
    const float4 term = *reinterpret_cast<const float4*>(row + e + 4 * q);
    partial[0] = add(partial[0], term.x);
    partial[1] = add(partial[1], term.y);
    partial[2] = add(partial[2], term.z);
    partial[3] = add(partial[3], term.w);
  }
}

// sum16 of the terms of each token, in the threads of the first warp: quad t has that of token t.
// term(t, column) returns four of them, zeros beyond the width.
template <class Shared, class Term>
CU_FAST_DEVICE float sums16(Shared& shared, int64_t width, const Term& term) {
  float partial[4] = {};
  for (int64_t first = 0; first < width; first += Shared::kStage) {
    sync_block();  // the previous terms have been read
#pragma unroll 2   // more tokens at a time would not fit the registers
    for (int t = 0; t < Shared::kTokens; ++t) {
      *reinterpret_cast<float4*>(&shared.rows[t][4 * thread_index()]) = term(t, first + 4 * thread_index());
    }
    sync_block();
    if (thread_index() < 4 * Shared::kTokens)
      add_terms<Shared::kStage>(partial, shared.rows[thread_index() / 4], width - first);
  }
  return quad_sum(partial);
}

CU_FAST_DEVICE bool fires(const DeleteLatentsParams& p, int64_t token, int32_t id, float pre) {
  if (!(pre > p.theta[id] && pre > 0)) return false;
  if (p.floor_scores == nullptr) return true;
  const float floor = p.floor_scores[token];
  return pre > floor || (pre == floor && id <= p.floor_ids[token]);
}

template <class T>
CU_FAST_DEVICE void store_four(float4 from, void* y, int64_t D, int64_t row, int64_t column) {
  T* const at = static_cast<T*>(y) + row * D + column;
  alignas(16) T narrowed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) narrow(entry(from, i), &narrowed[i]);
  if (column + 4 <= D && reinterpret_cast<uintptr_t>(at) % sizeof(narrowed) == 0) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(narrowed);
    } else {
      *reinterpret_cast<uint2*>(at) = *reinterpret_cast<const uint2*>(narrowed);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i < D) at[i] = narrowed[i];
    }
  }
}

CU_FAST_DEVICE void store_y(const DeleteLatentsParams& p, float4 y, int64_t token, int64_t column) {
  if (p.residual.dtype == Dtype::f32) {
    store_four<float>(y, p.y, p.Dout, token, column);
  } else if (p.residual.dtype == Dtype::bf16) {
    store_four<Bf16>(y, p.y, p.Dout, token, column);
  } else {
    store_four<Half>(y, p.y, p.Dout, token, column);
  }
}

// Bits, not numbers: a NaN keeps its payload.
template <class Word, int kBlock>
CU_FAST_DEVICE void copy_words(const void* from, void* to, int64_t first, int64_t end) {
  for (int64_t i = first + thread_index(); i < end; i += kBlock) {
    static_cast<Word*>(to)[i] = static_cast<const Word*>(from)[i];
  }
}

template <int kBlock>
CU_FAST_DEVICE void copy_residual(const DeleteLatentsParams& p, int64_t token) {
  const int64_t size = p.residual.dtype == Dtype::f32 ? 4 : 2;
  const void* const from = p.residual.from_row(token).data;
  void* const to = static_cast<char*>(p.y) + token * p.Dout * size;
  const bool wide = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0;
  const int64_t vectors = wide ? p.Dout * size / 16 : 0;
  copy_words<uint4, kBlock>(from, to, 0, vectors);
  if (size == 4) {
    copy_words<uint32_t, kBlock>(from, to, vectors * 4, p.Dout);
  } else {
    copy_words<uint16_t, kBlock>(from, to, vectors * 8, p.Dout);
  }
}

// Lists which of latents [begin, begin + kSlots) of a token's mask change. By the first warp.
template <class Shared>
CU_FAST_DEVICE void list_changes(const DeleteLatentsParams& p, int64_t token, int t, int64_t begin,
                                 Shared& shared) {
  const int64_t list = shared.mask[t] * p.M;
  const bool idles = shared.idles >> t & 1;
  int32_t used = 0;
  for (int64_t at = begin; at < begin + kSlots && at < shared.listed[t]; at += 32) {
    const int64_t i = at + lane_index();
    DecodeSlot mine = {};
    bool changes = false;
    if (i < shared.listed[t]) {
      const float pre = shared.pre[t][i];
      const float* const change = p.mask_change + (list + i) * 3;
      mine.id = p.mask_latents[list + i];
      if (fires(p, token, mine.id, pre)) {
        changes = true;
        mine.weight = add(add(multiply(change[0], pre), change[1]), -pre);
      } else if (idles) {
        mine.weight = change[2];
        changes = mine.weight != 0;
      }
    }
    const uint32_t those = ballot(changes);
    if (changes) shared.slots[used + count_bits(those & ((1u << lane_index()) - 1))] = mine;
    used += count_bits(those);
  }
  if (lane_index() == 0) shared.used = used;
}

// A token of which something fired. Returns its dose, to the block's first thread.
template <class Shared>
CU_FAST_DEVICE float change_token(const DeleteLatentsParams& p, int64_t token, int t, Shared& shared) {
  Matrix dec = p.dec;
  dec.dtype = Dtype::f32;
  const bool dec_fours = reads_fours(dec), residual_fours = reads_fours(p.residual);
  float partial[4] = {};  // first quad: of the squares of what is added; second: of the residual's
  for (int64_t first = 0; first < p.Dout; first += Shared::kStage) {
    const int64_t column = first + 4 * thread_index();
    const bool whole = dec_fours && column + 4 <= p.Dout;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int64_t begin = 0; begin < shared.listed[t]; begin += kSlots) {
      if (first == 0 || shared.listed[t] > kSlots) {
        sync_block();  // the previous slots have been read
        if (warp_index() == 0) list_changes(p, token, t, begin, shared);
        sync_block();
      }
      if (column >= p.Dout) continue;
      const int used = shared.used;
      const auto add_row = [&](float change, float4 row) {
#pragma unroll
        for (int c = 0; c < 4; ++c) entry(sum, c) = add(entry(sum, c), multiply(change, entry(row, c)));
      };
      if (whole) {
        const float* const column_of = static_cast<const float*>(dec.data) + column;
        for (int i = 0; i < used; i += kRowsInFlight) {
          float4 rows[kRowsInFlight];
#pragma unroll
          for (int r = 0; r < kRowsInFlight; ++r) {
            if (i + r < used) {
              rows[r] = *reinterpret_cast<const float4*>(column_of + shared.slots[i + r].id * dec.stride);
            }
          }
#pragma unroll
          for (int r = 0; r < kRowsInFlight; ++r) {
            if (i + r >= used) break;
            add_row(shared.slots[i + r].weight, rows[r]);
          }
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < used; ++i) {
          const uint4 raw = load_raw(dec, dec_fours, shared.slots[i].id, column, p.Dout);
          add_row(shared.slots[i].weight, widen_four(raw, Dtype::f32));
        }
      }
    }
    float4 kept = make_float4(0, 0, 0, 0), y = kept;
    if (column < p.Dout) {
      kept = widen_four(load_raw(p.residual, residual_fours, token, column, p.Dout), p.residual.dtype);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        // Beyond the width there is nothing: an infinite change has made NaN of its zeros.
        entry(sum, c) = column + c < p.Dout ? multiply(shared.sigma[t], entry(sum, c)) : 0.0f;
        entry(y, c) = add(entry(kept, c), entry(sum, c));
      }
      store_y(p, y, token, column);
    }
    sync_block();  // the previous squares have been added
    *reinterpret_cast<float4*>(&shared.rows[0][4 * thread_index()]) = squared(sum);
    *reinterpret_cast<float4*>(&shared.rows[1][4 * thread_index()]) = squared(kept);
    sync_block();
    if (thread_index() < 8)
      add_terms<Shared::kStage>(partial, shared.rows[thread_index() / 4], p.Dout - first);
  }
  const float norm = sqrtf(quad_sum(partial));
  return norm / shuffle_xor(norm, 4);
}

template <int kTokens, int kBlock, int kMost>
CU_FAST_KERNEL(kBlock, 512 / kBlock)
delete_latents(DeleteLatentsParams p) {
  start_kernel();
  using Shared = DeleteShared<kTokens, kBlock, kMost>;
  constexpr int kStage = Shared::kStage, kPairs = kBlock / 4;
  static_assert(kTokens <= kBlock / 32);
  Shared& shared = shared_memory<Shared>();
  const int64_t t0 = int64_t{block_index_x()} * kTokens;
  const int thread = thread_index();

  // The mask of each token, and how long its list is.
  if (thread == 0) shared.faulty = shared.idles = 0;
  sync_block();
  if (warp_index() < kTokens) {
    const int t = warp_index();
    const int32_t row = t0 + t < p.T ? p.mask_row[t0 + t] : -1;
    const bool exists = row >= 0 && row < p.U;
    int64_t listed = 0;
    while (exists && listed < p.M) {
      const int64_t i = listed + lane_index();
      const uint32_t ends = ballot(i >= p.M || p.mask_latents[row * p.M + i] < 0);
      listed += ends == 0 ? 32 : count_bits(~ends & (ends - 1));
      if (ends != 0) break;
    }
    if (lane_index() == 0) {
      shared.mask[t] = exists ? row : -1;
      shared.listed[t] = static_cast<int32_t>(listed);
      shared.hits[t] = 0;
      shared.rho[t] = shared.sigma[t] = 1;
      if (row != -1 && !exists) atomic_or(&shared.faulty, 1u << t);
    }
  }
  sync_block();

  // 1. A token without a mask counts as zeros; where none has one there is nothing to read.
  bool any = false;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) any = any || shared.mask[t] >= 0;
  const int64_t width = any ? p.Din : 0;
  const bool x_fours = reads_fours(p.x);
  const auto x = [&](int t, int64_t column) {
    if (shared.mask[t] < 0) return make_float4(0, 0, 0, 0);
    return widen_four(load_raw(p.x, x_fours, t0 + t, column, p.Din), p.x.dtype);
  };
  constexpr int kSharers = Shared::kSharers;
  {
    const int t = thread / kSharers;
    float largest = 0;
    for (int64_t column = 4 * (thread % kSharers); column < width; column += 4 * kSharers) {
      float4 four = x(t, column);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        largest = fmaxf(largest, is_finite(entry(four, c)) ? fabsf(entry(four, c)) : INFINITY);
      }
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, shuffle_xor(largest, lanes));
    if (lane_index() == 0) {
      shared.largest[warp_index()] = largest;
      if (!is_finite(largest)) atomic_or(&shared.faulty, 1u << t);
    }
  }
  if (p.scale != TokenScale::none) {
    const bool centres = p.scale == TokenScale::layer_norm;
    float sum = sums16(shared, width, [&](int t, int64_t column) {
      const float4 four = x(t, column);
      return centres ? four : squared(four);
    });
    if (centres) {
      if (thread < 4 * kTokens) shared.mean[thread / 4] = sum / static_cast<float>(p.Din);
      sum = sums16(shared, width, [&](int t, int64_t column) {
        float4 four = x(t, column);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          entry(four, c) = column + c < p.Din ? add(entry(four, c), -shared.mean[t]) : 0.0f;
        }
        return squared(four);
      });
    }
    if (thread < 4 * kTokens) {
      const int t = thread / 4;
      const float norm = sqrtf(centres ? sum / static_cast<float>(p.Din - 1) : sum);
      const float sigma = centres ? norm : norm / p.norm;
      shared.sigma[t] = sigma;
      shared.rho[t] = centres ? 1 / add(sigma, kLayerNormEps) : norm == 0 ? 0.0f : p.norm / norm;
      if (shared.mask[t] >= 0 && !is_finite(sigma)) atomic_or(&shared.faulty, 1u << t);
    }
  }
  sync_block();
  if (thread < kTokens) {
    float largest = 0;
    for (int w = 0; w < kSharers / 32; ++w) {
      largest = fmaxf(largest, shared.largest[thread * (kSharers / 32) + w]);
    }
    largest = fabsf(multiply(shared.rho[thread], largest));
    const bool finite = is_finite(largest) && (shared.faulty >> thread & 1) == 0;
    const int shift = finite ? shift_of(largest) : 0;
    shared.power[thread] = power_of_two(shift);
    shared.unit[thread] = finite ? power_of_two(-shift) : quiet_nan();
  }
  sync_block();

  // 2.
  const int64_t digits_width = digit_width(p.Din);
  const auto scores = [&](int t) { return shared.faulty >> t & 1 ? 0 : shared.listed[t]; };
  int32_t most = 0;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) most = scores(t) > most ? scores(t) : most;
  const int own = thread / 4 % kTokens;
  for (int32_t begin = 0; begin < most; begin += kPairs / kTokens) {
    const int32_t i = begin + thread / 4 / kTokens;
    const bool scored = i < scores(own);
    const int32_t id = scored ? p.mask_latents[shared.mask[own] * p.M + i] : -1;
    const bool exists = scored && id < p.R;
    int32_t level[1][kLevels] = {};
    for (int64_t first = 0; first < p.Din; first += kStage) {
      const int64_t column = first + 4 * thread;
      sync_block();  // the previous entries have been read
#pragma unroll 2     // more tokens at a time would not fit the registers
      for (int t = 0; t < kTokens; ++t) {
        float4 four = make_float4(0, 0, 0, 0);
        // Else rho may be Inf or NaN, and its product with a zero NaN.
        if (shared.unit[t] == shared.unit[t]) {
          four = x(t, column);
#pragma unroll
          for (int c = 0; c < 4; ++c) entry(four, c) = multiply(entry(four, c), shared.rho[t]);
        }
        uint32_t words[kDigits];
        cut_four(four, shared.power[t], words);
#pragma unroll
        for (int d = 0; d < kDigits; ++d) {
          *reinterpret_cast<uint32_t*>(shared.digits(t) + d * kStage + 4 * thread) = words[d];
        }
      }
      sync_block();
      if (exists) {
        const int64_t left = digits_width - first;
        add_columns<1, kLoads>(level, p.digits + id * kDigits * digits_width, digits_width, first,
                               static_cast<int>(left < kStage ? left : kStage),
                               [&](int, int c) { return load_digits(shared.digits(own), kStage, c); });
      }
    }
    const int64_t total = quad_total(level[0]);
    if (scored && thread % 4 == 0) {
      shared.pre[own][i] =
          exists ? round_score(total, shared.unit[own], {p.factor[id], p.bias[id]}) : quiet_nan();
    }
  }
  sync_block();

  // 3.
  {
    const int t = thread / kSharers;
    const int32_t end = scores(t);
    const int64_t list = shared.mask[t] * p.M;
    sync_block();  // all have read faulty
    int32_t hits = 0;
    for (int32_t i = thread % kSharers; i < end; i += kSharers) {
      const float pre = shared.pre[t][i];
      if (pre != pre) {
        atomic_or(&shared.faulty, 1u << t);
      } else if (fires(p, t0 + t, p.mask_latents[list + i], pre)) {
        ++hits;
        if (p.mask_change[(list + i) * 3 + 2] != 0) atomic_or(&shared.idles, 1u << t);
      }
    }
    if (hits != 0) atomic_add(&shared.hits[t], hits);
  }
  sync_block();

  // 4.
  for (int t = 0; t < kTokens && t0 + t < p.T; ++t) {
    const int64_t token = t0 + t;
    const bool faulty = shared.faulty >> t & 1;
    const int32_t hits = faulty ? 0 : shared.hits[t];
    float dose = faulty ? quiet_nan() : 0.0f;
    if (faulty) {
      const float4 nan = make_float4(dose, dose, dose, dose);
      for (int64_t column = 4 * thread; column < p.Dout; column += kStage) store_y(p, nan, token, column);
    } else if (hits == 0) {
      copy_residual<kBlock>(p, token);
    } else {
      dose = change_token(p, token, t, shared);
    }
    if (thread == 0) {
      p.hits[token] = hits;
      p.dose[token] = dose;
    }
  }
}

template <int kTokens, int kBlock, int kMost>
void launch_tokens(const DeleteLatentsParams& p, Stream stream) {
  const Grid2 grid{(p.T + kTokens - 1) / kTokens};
  launch(delete_latents<kTokens, kBlock, kMost>, grid, kBlock, stream, p);
}

}  // namespace

void launch_delete_latents(const DeleteLatentsParams& p, Stream stream) {
  if (p.T == 0) return;
  // Four tokens per block where that leaves work for half of the multiprocessors.
  constexpr int kMostOfFour = 512;
  if (p.M <= kMostOfFour && p.T > 2 * int64_t{multiprocessors()}) {
    launch_tokens<4, 512, kMostOfFour>(p, stream);
  } else {
    launch_tokens<1, 256, kMaxMaskLatents>(p, stream);
  }
}

}  // namespace cu_fast
