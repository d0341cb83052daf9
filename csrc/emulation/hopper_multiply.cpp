// Asynchronous multiplies of a warpgroup; interface: hopper.h, meaning: cuda/device_sm90.h.
//
// A warp's part of a multiply needs only its own registers and shared memory, so it is computed per warp,
// when that warp waits for it. Until then d keeps its old value. What must not change until then is compared
// with a copy of what it was.

#include <array>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "emulation/hopper.h"
#include "emulation/machine.h"

namespace cu_fast::emulation {
namespace {

constexpr int kMostColumns = 128, kDepth = 32, kWarpsOfGroup = 4;
constexpr uint64_t kAddressBits = 0x3ffff;

using Registers = std::array<int32_t, 64>;
using Bytes = std::array<int8_t, kMostColumns * kDepth>;

struct Multiply {
  int64_t group;
  uint64_t descriptor;
  TileShape shape;
  Place place;
  int32_t* d[kLanes];
  const uint32_t* a[kLanes];
  std::array<uint32_t, 4> a_then[kLanes];
  Registers d_then[kLanes];
  bool first_of_d;  // no other multiply into this d was in flight
  Bytes b_then;
};

struct Multiplies {
  int64_t groups = 0;  // closed so far
  int64_t count = 0;
  bool fenced = false;
  std::vector<Multiply> pending;
};

// A multiply of a warpgroup: all its warps must issue the same.
struct Step {
  uint64_t descriptor;
  Place place;
};

std::map<const Warp*, Multiplies> multiplies;
std::map<const Warp*, std::vector<Step>> steps;  // keyed by the first warp of the group

int index_of(const Warp& warp) {
  return static_cast<int>(&warp - warp.block->warps);
}

const Warp* leader(const Warp& warp) {
  return &warp.block->warps[index_of(warp) / kWarpsOfGroup * kWarpsOfGroup];
}

// The columns of a d, as they are now.
Registers registers_of(const int32_t* d, TileShape shape) {
  Registers all = {};
  for (int i = 0; i < shape.columns / 2; ++i) all[i] = d[i / 4 * shape.stride + i % 4];
  return all;
}

Bytes read_tile(const Warp& warp, uint64_t descriptor, TileShape shape, const Place& place) {
  const auto field = [&](int bit) { return (descriptor >> bit & 0x3fff) << 4; };
  const uint64_t start = field(0), along_k = field(16), along_columns = field(32);
  if (descriptor >> 46 != 0 || (descriptor >> 14 & 3) != 0 || (descriptor >> 30 & 3) != 0) {
    fail("multiply_tile with a swizzle, a base offset or unknown bits in its descriptor", &place);
  }
  const Block& block = *warp.block;
  const unsigned char* const arena = block.arena;
  Bytes bytes = {};
  for (int column = 0; column < shape.columns; column += 8) {
    for (int k = 0; k < kDepth; k += 16) {
      const uint64_t address = start + column / 8 * along_columns + k / 16 * along_k;
      const unsigned char* const core =
          arena + ((address - reinterpret_cast<uintptr_t>(arena)) & kAddressBits);
      if (!within_objects(block, core, 128))
        fail("multiply_tile reads outside of the block's shared memory", &place);
      if (!fenced(block, core))
        fail("multiply_tile reads what copy_async wrote, without fence_writes in between", &place);
      for (int i = 0; i < 8; ++i) std::memcpy(&bytes[(column + i) * kDepth + k], core + 16 * i, 16);
    }
  }
  return bytes;
}

void begin(Warp& warp, uint64_t descriptor, TileShape shape, const Place& place) {
  Multiplies& ours = multiplies[&warp];
  if (!ours.fenced) fail("multiply_tile, the first of its group, without fence_multiplies before it", &place);
  if (index_of(warp) / kWarpsOfGroup * kWarpsOfGroup + kWarpsOfGroup > warp.block->threads / kLanes) {
    fail("multiply_tile by a warp that has no whole warpgroup", &place);
  }
  std::vector<Step>& all = steps[leader(warp)];
  if (ours.count == static_cast<int64_t>(all.size())) all.push_back({descriptor, place});
  const Step& step = all[ours.count++];
  if (step.place.line() != place.line() || step.place.column() != place.column()) {
    fail("multiply_tile, while another warp of the group is at that in " + text(step.place), &place);
  }
  if (step.descriptor != descriptor)
    fail("multiply_tile with another descriptor than its warpgroup's", &place);
  Multiply& made = ours.pending.emplace_back();
  made.group = ours.groups;
  made.descriptor = descriptor;
  made.shape = shape;
  made.place = place;
  made.first_of_d = true;
  made.b_then = read_tile(warp, descriptor, shape, place);
  for (int lane = 0; lane < kLanes; ++lane) {
    made.d[lane] = warp.factors[lane].d;
    made.a[lane] = warp.factors[lane].a;
    std::memcpy(made.a_then[lane].data(), made.a[lane], sizeof(made.a_then[lane]));
    made.d_then[lane] = registers_of(made.d[lane], shape);
  }
  for (std::size_t i = 0; i + 1 < ours.pending.size(); ++i) {
    if (ours.pending[i].d[0] == made.d[0]) made.first_of_d = false;
  }
}

template <class A>
void end(const Warp& warp, Multiply& m) {
  if (read_tile(warp, m.descriptor, m.shape, m.place) != m.b_then) {
    fail("shared memory changed while this multiply_tile read it", &m.place);
  }
  A a[16][kDepth];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, q = lane % 4;
    if (std::memcmp(m.a[lane], m.a_then[lane].data(), sizeof(m.a_then[lane])) != 0) {
      fail("registers changed while this multiply_tile read them (a of lane " + std::to_string(lane) + ")",
           &m.place);
    }
    if (m.first_of_d && registers_of(m.d[lane], m.shape) != m.d_then[lane]) {
      fail("registers changed while this multiply_tile wrote them (d of lane " + std::to_string(lane) + ")",
           &m.place);
    }
    for (int i = 0; i < 4; ++i) std::memcpy(&a[g + i % 2 * 8][i / 2 * 16 + 4 * q], &m.a[lane][i], 4);
  }
  for (int column = 0; column < m.shape.columns / 8; ++column) {
    int8_t b[8][kDepth];
    int32_t sums[16][8];
    std::memcpy(b, &m.b_then[column * 8 * kDepth], sizeof(b));
    multiply(a, b, sums);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int i = 0; i < 4; ++i) {
        int32_t& d = m.d[lane][column * m.shape.stride + i];
        const int64_t sum = int64_t{d} + sums[g + i / 2 * 8][2 * q + i % 2];
        d = static_cast<int32_t>(static_cast<uint32_t>(sum));  // modulo 2^32
        if (m.shape.is_signed && d != sum) fail("multiply_signed_tile with a sum beyond int32", &m.place);
      }
    }
  }
}

}  // namespace

void reset_multiplies(const Block* block) {
  std::erase_if(multiplies, [&](const auto& one) { return !block || one.first->block == block; });
  std::erase_if(steps, [&](const auto& one) { return !block || one.first->block == block; });
}

void check_ended_multiplies(const Thread& thread) {
  if (multiplies.empty()) return;
  const auto found = multiplies.find(thread.warp);
  if (found != multiplies.end() && !found->second.pending.empty()) {
    fail("ended and had not waited for multiply_tile", &found->second.pending.front().place);
  }
  const auto all = steps.find(leader(*thread.warp));
  const Block& block = *thread.warp->block;
  if (all == steps.end() || block.ended + 1 < block.threads) return;
  for (const auto& [first, sequence] : steps) {
    for (int w = 0; first->block == &block && w < kWarpsOfGroup; ++w) {
      if (multiplies[first + w].count == static_cast<int64_t>(sequence.size())) continue;
      fail("a warp of the group ended without this multiply_tile",
           &sequence[multiplies[first + w].count].place);
    }
  }
}

uint64_t describe_tile(const void* shared, int along_k, int along_columns, Place place) {
  const auto address = reinterpret_cast<uintptr_t>(shared) & kAddressBits;
  for (const uint64_t x :
       {uint64_t{address}, static_cast<uint64_t>(along_k), static_cast<uint64_t>(along_columns)}) {
    if (x % 16 != 0 || x > kAddressBits)
      fail("describe_tile: must be multiples of 16, less than 2^18", &place);
  }
  return address >> 4 | static_cast<uint64_t>(along_k) >> 4 << 16 |
         static_cast<uint64_t>(along_columns) >> 4 << 32;
}

void fence_multiplies(Place place) {
  Warp& warp = join(Collective::kFenceMultiplies, place);
  meet(warp, [&] { multiplies[&warp].fenced = true; });
}

void fence_writes(Place place) {
  if (!machine.running) fail("fence_writes", &place);
  ++machine.running->fences;
}

void multiply_tile(int32_t* d, const uint32_t* a, uint64_t b, TileShape shape, Place place) {
  Warp& warp = join(Collective::kMultiplyTile, place);
  const int lane = machine.running->lane;
  uint64_t* const descriptors = warp.values[warp.turn];
  descriptors[lane] = b;
  warp.factors[lane] = {d, a, nullptr};
  meet(warp, [&] {
    for (int i = 0; i < kLanes; ++i) {
      if (descriptors[i] != b) fail("multiply_tile with another descriptor than its warpgroup's", &place);
    }
    begin(warp, b, shape, place);
  });
}

void commit_multiplies(Place place) {
  Warp& warp = join(Collective::kCommitMultiplies, place);
  meet(warp, [&] {
    Multiplies& ours = multiplies[&warp];
    ++ours.groups;
    ours.fenced = false;
  });
}

void wait_multiplies(int pending, Place place) {
  Warp& warp = join(Collective::kWaitMultiplies, place);
  meet(warp, [&] {
    Multiplies& ours = multiplies[&warp];
    std::size_t ended = 0;
    for (; ended < ours.pending.size() && ours.pending[ended].group < ours.groups - pending; ++ended) {
      Multiply& next = ours.pending[ended];
      next.shape.is_signed ? end<int8_t>(warp, next) : end<uint8_t>(warp, next);
    }
    ours.pending.erase(ours.pending.begin(), ours.pending.begin() + static_cast<std::ptrdiff_t>(ended));
    // The next multiply into the same d must find what these left there.
    for (std::size_t i = 0; ended > 0 && i < ours.pending.size(); ++i) {
      Multiply& next = ours.pending[i];
      if (next.first_of_d) continue;
      next.first_of_d = true;
      for (std::size_t j = 0; j < i; ++j) next.first_of_d &= ours.pending[j].d[0] != next.d[0];
      for (int lane = 0; lane < kLanes; ++lane) next.d_then[lane] = registers_of(next.d[lane], next.shape);
    }
  });
}

}  // namespace cu_fast::emulation
