// Deletion of latents on the CPU: tokens sorted by mask, in blocks; few tokens also by parts of the masks' lists.
// The kernel: delete_latents-inl.h.

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/delete_latents.h"
#include "cpu/grid.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "host/cpu.h"

namespace cu_fast {
namespace {

// Tokens by mask, in their order: first those without one.
struct SortedTokens {
  std::vector<int64_t> order;
  int64_t unmasked;

  explicit SortedTokens(const DeleteLatentsParams& p) : order(p.T) {
    std::vector<int64_t> place(p.U + 2);
    for (int64_t t = 0; t < p.T; ++t) ++place[p.mask_row[t] + 2];
    for (int64_t u = 0; u <= p.U; ++u) place[u + 1] += place[u];
    unmasked = place[1];
    for (int64_t t = 0; t < p.T; ++t) order[place[p.mask_row[t] + 1]++] = t;
  }
};

void copy_token(const DeleteLatentsParams& p, int64_t token) {
  const Matrix from = p.residual.from_row(token);
  const int64_t bytes = p.Dout * (from.dtype == Dtype::f32 ? 4 : 2);
  std::memcpy(static_cast<char*>(p.y) + token * bytes, from.data, bytes);
  p.hits[token] = 0;
  p.dose[token] = 0;
}

// Where a block ends that begins at `t`: its tokens have one mask, and are as many as in the mask's others.
int64_t block_end(const DeleteLatentsParams& p, const int64_t* order, int64_t t, int64_t end) {
  int64_t same = t + 1;
  while (same < end && p.mask_row[order[same]] == p.mask_row[order[t]]) ++same;
  const int64_t blocks = (same - t + kLatentTokens - 1) / kLatentTokens;
  return t + (same - t + blocks - 1) / blocks;
}

// Multiplications that take as long as reading or writing an element.
constexpr int64_t kWorkOfElement = 4;
// Multiplications that justify waking a thread: about 10 us.
constexpr int64_t kWorkOfThread = 1024 * 1024;
// Latents that justify a part of their own.
constexpr int64_t kPartLatents = 16;

}  // namespace

void Cpu::delete_latents(const DeleteLatentsParams& p) const {
  const auto run = CU_FAST_DISPATCH(delete_latents);
  if (p.T == 0) return;

  const SortedTokens sorted(p);
  const int64_t unmasked = sorted.unmasked, masked = p.T - unmasked;
  const int64_t* const with_mask = sorted.order.data() + unmasked;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t moving = kWorkOfElement * (p.Din + 2 * p.Dout);
  const int64_t rows = masked == 0 ? 0 : p.M * p.Din, work = (masked + kWorkOfElement) * rows + p.T * moving;
  const int64_t most = std::min(threads, 1 + work / kWorkOfThread);
  // Blocks of tokens that keep all threads busy; if there are too few, parts of the lists too.
  const int64_t blocks = std::max<int64_t>(1, masked / kFairTokens);
  const int64_t parts =
      blocks >= most || masked == 0 ? 1 : std::clamp<int64_t>(p.M / kPartLatents, 1, most / blocks);
  const int64_t workers = parts > 1 ? most : std::min(most, p.T);

  const LatentScratch at(p);
  const int64_t floats = round_up(at.size(), kLanes);
  const int64_t shared = parts > 1 ? masked * (at.listed + 1) : 0;
  Tensor memory = empty({workers * floats + shared}, ScalarType::Float);
  float* const scratch = memory.mutable_data_ptr<float>();
  const LatentScores all = {scratch + workers * floats, scratch + workers * floats + masked * at.listed};

  // Tokens [begin, end) of those with a mask, against [c_begin, c_end) of their masks' lists.
  const auto run_tokens = [&](int64_t worker, int64_t begin, int64_t end, int64_t c_begin, int64_t c_end,
                              LatentStep step) {
    float* const mine = scratch + worker * floats;
    for (int64_t t = begin, next; t < end; t = next) {
      next = block_end(p, with_mask, t, end);
      const LatentScores scores = step == LatentStep::both ? LatentScores{mine + at.pre(), mine + at.sigma()}
                                                           : all.from_token(t, p.M);
      run(p, {t, next, c_begin, c_end, 0, with_mask}, step, mine, scores);
    }
  };
  if (parts > 1) {
    const int64_t part = round_up((p.M + parts - 1) / parts, 4), share = (masked + blocks - 1) / blocks;
    parallel(workers, blocks * parts, [&](int64_t worker, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i % blocks * share, m = i / blocks * part;
        run_tokens(worker, t, std::min(masked, t + share), m, std::min(p.M, m + part), LatentStep::score);
      }
    });
  }
  const int64_t finishers = parts > 1 ? std::min({workers, p.T, 1 + p.T * moving / kWorkOfThread}) : workers;
  parallel(finishers, finishers, [&](int64_t worker, int64_t begin, int64_t end) {
    const auto share = [&](int64_t n, int64_t w) {
      return w == finishers ? n : round_up(n * w / finishers, 4);
    };
    for (int64_t t = unmasked * begin / finishers; t < unmasked * end / finishers; ++t)
      copy_token(p, sorted.order[t]);
    run_tokens(worker, std::min(masked, share(masked, begin)), std::min(masked, share(masked, end)), 0, p.M,
               parts > 1 ? LatentStep::apply : LatentStep::both);
  });
}

}  // namespace cu_fast
