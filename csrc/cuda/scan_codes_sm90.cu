// scan_codes for many tokens on Hopper: the same sums, by warpgroups. What is done with them: end_tile.h.
//
//   I_i(t, j) = <d_i of row t, c_j>       i = 0, 1
//
//   what   shape                                     where it stays
//   plane  [G, E / 4, 64, 4] uint8                   global -> registers, kAhead steps ahead
//   bytes  [kSlots, kColumns, kSteps, 2, 8, 4] u32   shared: slots for stages of kSteps steps
//   sums   [2, kColumns, 4] per thread               registers
//
// 1. As in scan_codes, a warp takes 32 codes, a block 256, and all 64 tokens of a tile. Codes are the first
//    factor of multiply_tile, in registers. Tokens are the second: a core matrix is both digits of four tokens
//    by 16 bytes of k.
// 2. Each warp copies its share of a stage, one piece per column of four tokens. A stage is full when all its
//    bytes have arrived.
// 3. A step's multiplies run while the registers of the next step are set: there are two sets of factors.
//    Loads in flight have registers of their own, because a multiply may still read the factors.
// 4. kResident, up to kResidentSteps steps: there is a slot for each stage. A block's tiles are of the same tokens, so
//    these are copied once. Its first tile waits for one stage after the other, and no other tile for any.
// 5. Else the slots are a ring: one is empty when every warp's multiplies that read it are complete, and then gets
//    another stage. Stages are counted over all tiles of a block: those of the next tile arrive while this one ends.
//
// Shared memory past the last token or step is not initialised. It is multiplied anyway: past the last token any sums
// will do (end_tile.h), int8 has no NaN, and past the last step the codes are zeros.

#include "cuda/device_sm90.h"
#include "cuda/scan_codes.h"

#include <type_traits>

namespace cu_fast {
namespace {

constexpr int kTokens = 64, kColumns = kTokens / 4, kGroups = kThreads / 64;
constexpr int kAhead = 4, kResidentSteps = SelectTuning::kResidentSteps;

// Dynamic shared memory.
template <bool kSample, bool kResident>
struct Shared {
  static constexpr int kSteps = kResident ? kAhead : 2, kSlots = kResident ? kResidentSteps / kAhead : 4;
  static_assert(kAhead % kSteps == 0 && kAhead % 2 == 0 && kResidentSteps % kAhead == 0,
                "kAhead unrolled steps are whole stages, and alternate between 2 factors");

  alignas(16) uint32_t bytes[kSlots][kColumns][kSteps][64];
  TileRows<kTokens> rows;
  // Not among the stages, which are filled or read meanwhile.
  std::conditional_t<kSample, TileDeleted<kTokens>, TileList<kTokens>> end;
  uint64_t full[kSlots], empty[kSlots];
};

template <bool kSample, bool kResident>
CU_FAST_KERNEL(kThreads, 1)
scan_codes_sm90(SelectJob job) {
#ifdef CU_FAST_HAS_HOPPER
  start_kernel();
  constexpr int kSteps = Shared<kSample, kResident>::kSteps, kSlots = Shared<kSample, kResident>::kSlots;
  auto& shared = dynamic_shared_memory<Shared<kSample, kResident>>();
  const SelectParams& p = job.p;
  const int t0 = block_index_x() * kTokens;  // within the chunk
  const int q = lane_index() % 4, g = lane_index() / 4;
  const int steps = static_cast<int>((p.score.E + 31) / 32);
  const int visited = static_cast<int>(visits(job, kSample, kGroups));
  // Stages per tile, and those that this block copies.
  const int stages = (steps + kAhead - 1) / kAhead * (kAhead / kSteps);
  const int tiles = kResident ? 1 : (visited - block_index_y() + grid_size_y() - 1) / grid_size_y();
  const int all_stages = tiles * stages;

  // Called by one thread of each warp, for that warp's columns.
  constexpr int kColumnsOfWarp = kColumns / kWarps;
  const auto copy_stage = [&](int stage) {
    const int slot = stage % kSlots, begin = (kResident ? stage : stage % stages) * kSteps;
    const int left = steps - begin, bytes = (left < 0 ? 0 : left < kSteps ? left : kSteps) * 256;
    const int first = warp_index() * kColumnsOfWarp;
    const int there = (static_cast<int>(p.score.T) - t0 + 3) / 4 - first;
    const int columns = bytes == 0 || there < 0 ? 0 : there < kColumnsOfWarp ? there : kColumnsOfWarp;
    barrier_expect(&shared.full[slot], columns * bytes);
#pragma unroll
    for (int i = 0; i < kColumnsOfWarp; ++i) {
      const uint32_t* const from = job.work.bytes + (int64_t{t0 / 4 + first + i} * steps + begin) * 64;
      if (i < columns) copy_bulk(shared.bytes[slot][first + i], from, bytes, &shared.full[slot]);
    }
  };

  if (thread_index() == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(&shared.full[i], kWarps);
      if (!kResident) barrier_init(&shared.empty[i], kWarps);
    }
    fence_barrier_init();
  }
  load_rows(job, t0, kSample, shared.rows);
  if constexpr (!kSample) clear_list(shared.end);
  sync_block();
  if (lane_index() == 0) {
#pragma unroll 1
    for (int i = 0; (kResident || i < kSlots - 1) && i < all_stages; ++i) copy_stage(i);
  }

  int stage = 0;
  bool waits = true;
  [[maybe_unused]] int turn = 0;
  for (int visit = block_index_y(); visit < visited; visit += grid_size_y()) {
    const int group = kSample ? sample_of_warp<kGroups>(job, visit) : 0;
    const int tile = visit * int{kScanTile};
    const WarpCodes codes(p, kSample ? first_of_sample(job, group) : tile + 32 * warp_index());
    int32_t sums[2][kColumns][4];
    start_sums(shared.rows, sums);
    fence_sums(sums[0]);
    fence_sums(sums[1]);
    uint4 ahead[kAhead][2];
    Factors factors[2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      ahead[i][0] = codes.load(8 * i + q);
      ahead[i][1] = codes.load(8 * i + 4 + q);
    }
    if constexpr (kSample) load_deleted(job, t0, codes.first, shared.end);
    for (int begin = 0; begin < steps; begin += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int word = 8 * (begin + i) + q, slot = kResident ? begin / kSteps : stage % kSlots;
        const uint32_t parity = kResident ? 0 : stage / kSlots % 2;
        const uint4 none = make_uint4(0, 0, 0, 0);
        Factors& a = factors[i % 2];
        a.set(word < codes.words ? ahead[i][0] : none, word + 4 < codes.words ? ahead[i][1] : none);
        ahead[i][0] = codes.load(word + 8 * kAhead);
        ahead[i][1] = codes.load(word + 8 * kAhead + 4);
        if (i % kSteps == 0 && waits) barrier_wait(&shared.full[slot], parity);
        sync_warp();
        fence_multiplies();
        const uint64_t b = describe_tile(shared.bytes[slot][0][i % kSteps], 128, kSteps * 256);
        multiply_tile(sums[0], a.of[0], b);
        multiply_tile(sums[1], a.of[1], b);
        commit_multiplies();
        wait_multiplies<1>();
        if constexpr (!kResident) {
          // The previous step's multiplies are complete; if that was a stage's last step, release the stage.
          // Before a block's first stage there is none: that arrival completes phase 0 of the last slot's
          // `empty`, so that the wait below is the same for every stage.
          const int last = (slot + kSlots - 1) % kSlots;
          if (i % kSteps == 0 && lane_index() == 0) barrier_arrive(&shared.empty[last]);
          // The refill waits until all warps have released the slot. One step after the release, the others
          // have mostly released too.
          if (i % kSteps == kSteps - 1) {
            if (lane_index() == 0 && stage + kSlots - 1 < all_stages) {
              barrier_wait(&shared.empty[last], parity);
              copy_stage(stage + kSlots - 1);
            }
            ++stage;
          }
        }
      }
    }
    waits = !kResident;
    const FourCodes four(p, codes.first + 4 * g);  // loaded while the last multiplies run
    sync_warp();
    wait_multiplies<0>();
    fence_sums(sums[0]);
    fence_sums(sums[1]);
    if constexpr (kSample) {
      const int64_t place = group * kMaximaOfGroup + 8 * (warp_index() % 2);
      end_sample(job, t0, place, four, shared.rows, shared.end, sums);
    } else {
      end_tile(job, t0, tile, shared.rows, CheapCodes(four), sums, shared.end, turn);
      turn ^= 1;
    }
  }
#else
  __trap();  // has_hopper() keeps it from being launched here
#endif
}

}  // namespace

void launch_scan_codes_sm90(const SelectJob& job, bool sample, Stream stream) {
  const int64_t tiles = visits(job, sample, kGroups);
  // A block is persistent and takes tile after tile. The registers of a multiprocessor suffice for one block.
  const int64_t token_tiles = (job.p.score.T + kTokens - 1) / kTokens;
  const Grid2 grid{token_tiles, std::clamp<int64_t>(multiprocessors() / token_tiles, 1, tiles)};
  // With one tile per block there is nothing to keep the tokens for.
  const bool resident = job.p.score.E <= 32 * kResidentSteps && tiles > grid.y;
  const auto run = [&](auto is_sample, auto is_resident) {
    constexpr bool kSample = decltype(is_sample)::value, kResident = decltype(is_resident)::value;
    constexpr int kShared = sizeof(Shared<kSample, kResident>);
    static_assert(kShared <= 227 << 10, "what a block has");
    launch(scan_codes_sm90<kSample, kResident>, grid, {kThreads, kShared}, stream, job);
  };
  const auto run_resident = [&](auto is_resident) {
    sample ? run(std::true_type{}, is_resident) : run(std::false_type{}, is_resident);
  };
  resident ? run_resident(std::true_type{}) : run_resident(std::false_type{});
}

}  // namespace cu_fast
