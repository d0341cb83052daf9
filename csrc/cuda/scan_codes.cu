// Scores every code against every token in int8, on the tensor cores, for bounds on the scores and candidates
// for the k best. How codes are read: scan_codes.h. What is done with the sums: end_tile.h. Many tokens on Hopper:
// scan_codes_sm90.cu.
//
//   I_i(t, j) = <d_i of row t, c_j>       i = 0, 1
//
//   what   shape                           where it stays
//   plane  [G, E / 4, 64, 4] uint8         global -> registers, kAhead steps ahead
//   bytes  [kTokens / 4, K, 2, 8, 4] u32   shared, kSteps steps at a time, kStages stages in flight
//   sums   [2, kTokens / 4, 4] per thread  registers
//
// 1. A warp takes 32 codes, a block 256, and all kTokens tokens of a tile. Codes are the 16 rows of
//    multiply_bytes, two digits of four tokens its 8 columns.
// 2. Codes are loaded kAhead steps ahead, into registers. Bytes of z come through cp.async, once for the
//    block. Past the end of a code its words are arbitrary, and the bytes of z zeros.
// 3. For few tokens the sample is in blocks of two warps, a group of 64 codes each, to keep more multiprocessors busy.

#include "cuda/launch.h"
#include "cuda/scan_codes.h"

#include <cstdlib>
#include <string_view>
#include <type_traits>

namespace cu_fast {
namespace {

constexpr int kStages = 4;

template <int kTokens>
struct StageOf {
  // A stage is 8 KiB: a step is 256 bytes per four tokens.
  static constexpr int kSteps = 128 / kTokens;
  alignas(16) uint32_t bytes[kTokens / 4][kSteps][64];
};

template <int kTokens, bool kSample>
inline constexpr int kBlock =
    kTokens <= 32 && kSample ? 64 : kThreads;  // as in the macro, which takes no comma

template <int kTokens, bool kSample>
CU_FAST_KERNEL(kTokens <= 32 && kSample ? 64 : kThreads, kTokens >= 32 ? 1 : 2)
scan_codes(SelectJob job) {
  using Stage = StageOf<kTokens>;
  constexpr int kColumns = kTokens / 4, kGroups = kBlock<kTokens, kSample> / 64;
  // Few tokens: memory-bound, and alone on a multiprocessor in the sample; many: registers are scarce.
  constexpr int kAhead = kGroups == 1 ? 8 : kTokens >= 32 ? 2 : 4;
  struct Shared {
    Stage stage[kStages];
    TileRows<kTokens> rows;
    std::conditional_t<kSample, TileDeleted<kTokens>, TileList<kTokens>> end;
  };
  start_kernel();
  Shared& shared = shared_memory<Shared>();
  const SelectParams& p = job.p;
  const ScanWork& work = job.work;
  const int lane = lane_index(), q = lane % 4, g = lane / 4;
  const int t0 = block_index_x() * kTokens;  // within the chunk
  const int steps = static_cast<int>((p.score.E + 31) / 32);
  const int visited = static_cast<int>(visits(job, kSample, kGroups));
  load_rows(job, t0, kSample, shared.rows);
  if constexpr (!kSample) clear_list(shared.end);

  [[maybe_unused]] int turn = 0;
  for (int visit = block_index_y(); visit < visited; visit += grid_size_y()) {
    const int group = kSample ? sample_of_warp<kGroups>(job, visit) : 0;
    const int tile = visit * int{kScanTile};
    const WarpCodes codes(p, kSample ? first_of_sample(job, group) : tile + 32 * warp_index());
    const auto copy_stage = [&](int begin) {
      Stage& stage = shared.stage[begin / Stage::kSteps % kStages];
      constexpr int kPieces = kColumns * Stage::kSteps * 16;  // copies of 16 bytes
#pragma unroll 1                                              // registers are scarce
      for (int i = thread_index(); i < kPieces; i += 64 * kGroups) {
        const int column = i / (Stage::kSteps * 16), rest = i % (Stage::kSteps * 16);
        const int step = begin + rest / 16;
        // work.bytes has columns of four tokens, and none after the last token.
        const bool valid = step < steps && t0 + 4 * column < p.score.T;
        const int64_t from = (int64_t{t0 / 4 + column} * steps + step) * 64 + rest % 16 * 4;
        copy_async(reinterpret_cast<char*>(stage.bytes[column]) + rest * 16, work.bytes + (valid ? from : 0),
                   valid);
      }
      commit_copies();
    };

    uint4 ahead[kAhead][2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      ahead[i][0] = codes.load(8 * i + q);
      ahead[i][1] = codes.load(8 * i + 4 + q);
    }
    if constexpr (kSample) load_deleted(job, t0, codes.first, shared.end);
    sync_block();  // the rows are there, the last tile's stages have been read
    for (int i = 0; i < kStages - 1; ++i) copy_stage(i * Stage::kSteps);
    int32_t sums[2][kColumns][4];
    start_sums(shared.rows, sums);
    for (int begin = 0; begin < steps; begin += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int step = begin + i;
        if (step % Stage::kSteps == 0) {
          wait_copies<kStages - 2>();
          sync_block();
          copy_stage(step + (kStages - 1) * Stage::kSteps);
        }
        Factors a;
        a.set(ahead[i][0], ahead[i][1]);
        ahead[i][0] = codes.load(8 * (step + kAhead) + q);
        ahead[i][1] = codes.load(8 * (step + kAhead) + 4 + q);
        sync_warp();  // keeps the loads before the products: ptxas would issue them where they are waited for
        const Stage& stage = shared.stage[step / Stage::kSteps % kStages];
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const uint32_t* const b = stage.bytes[column][step % Stage::kSteps];
          multiply_bytes(sums[0][column], a.of[0], {b[lane], b[32 + lane]});
          multiply_bytes(sums[1][column], a.of[1], {b[lane], b[32 + lane]});
        }
      }
    }
    const FourCodes four(p, codes.first + 4 * g);  // loaded while the last products run
    wait_copies<0>();
    if constexpr (kSample) {
      const int64_t place = group * kMaximaOfGroup + 8 * (warp_index() % 2);
      end_sample(job, t0, place, four, shared.rows, shared.end, sums);
    } else {
      end_tile(job, t0, tile, shared.rows, CheapCodes(four), sums, shared.end, turn);
      turn ^= 1;
    }
  }
}

template <int kTokens, bool kSample>
void launch_tiles(const SelectJob& job, Stream stream) {
  constexpr int kThreadsOf = kBlock<kTokens, kSample>;
  const Grid2 grid{(job.p.score.T + kTokens - 1) / kTokens,
                   std::min(visits(job, kSample, kThreadsOf / 64), SelectTuning::kTilesAtOnce)};
  launch(scan_codes<kTokens, kSample>, grid, kThreadsOf, stream, job);
}

template <int kTokens>
void launch_tiles(const SelectJob& job, bool sample, Stream stream) {
  return sample ? launch_tiles<kTokens, true>(job, stream) : launch_tiles<kTokens, false>(job, stream);
}

}  // namespace

bool has_hopper() {
#ifdef CU_FAST_EMULATED
  return emulated_hopper();
#else
  static const bool wanted = [] {
    const char* const setting = std::getenv("CU_FAST_WGMMA");
    return built_for("90a") && !(setting != nullptr && std::string_view(setting) == "0");
  }();
  return wanted && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
#endif
}

void launch_scan_codes(const SelectJob& job, bool sample, Stream stream) {
  const int64_t T = job.p.score.T;
  if (T <= 4) return launch_tiles<4>(job, sample, stream);
  if (T <= 8) return launch_tiles<8>(job, sample, stream);
  if (T <= 32) return launch_tiles<32>(job, sample, stream);
  if (has_hopper()) return launch_scan_codes_sm90(job, sample, stream);
  launch_tiles<64>(job, sample, stream);
}

}  // namespace cu_fast
