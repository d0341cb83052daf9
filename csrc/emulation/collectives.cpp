// Operations of a whole warp or block; interface: device.h.

#include <bit>
#include <cstring>
#include <string>

#include "emulation/machine.h"

namespace cu_fast::emulation {
namespace {

Thread& running(const Place& place) {
  Thread* const thread = machine.running;
  if (!thread) fail("a collective", &place);
  if (!thread->started) fail("had not called start_kernel", &place);
  return *thread;
}

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && std::string_view(a.file_name()) == b.file_name();
}

}  // namespace

Warp& join(Collective kind, const Place& place) {
  Thread& thread = running(place);
  Warp& warp = *thread.warp;
  if (!warp.waiting) {
    warp.collective = kind;
    warp.place = place;
  } else if (warp.collective != kind || !same(warp.place, place)) {
    const std::string other = "lane " + std::to_string(std::countr_zero(warp.waiting)) +
                              " of the warp is at " + text(warp.collective) + " in " + text(warp.place);
    fail(other + ", this one at " + text(kind), &place);
  }
  warp.waiting |= 1u << thread.lane;
  return warp;
}

void start_kernel(Place place) {
  if (!machine.running) fail("start_kernel", &place);
  machine.running->started = true;
  machine.kernel = place.function_name();
}

void sync_block(Place place) {
  Thread& thread = running(place);
  Warp& warp = *thread.warp;
  Block& block = *warp.block;
  if (warp.at_barrier && !same(warp.barrier_place, place)) {
    fail("a lane of the warp is at sync_block in " + text(warp.barrier_place) + ", this one at sync_block",
         &place);
  }
  warp.barrier_place = place;
  warp.at_barrier |= 1u << thread.lane;
  if (++block.at_barrier == block.threads) {
    block.at_barrier = 0;
    for (int w = 0; w < block.threads / kLanes; ++w) {
      block.warps[w].at_barrier = 0;
      make_ready(block.warps[w], ~0u);
    }
  }
  wait();
}

void sync_warp(Place place) {
  meet(join(Collective::kSyncWarp, place), [] {});
}

const uint64_t* exchange(Collective kind, uint64_t x, Place place) {
  Warp& warp = join(kind, place);
  uint64_t* const values = warp.values[warp.turn];
  values[machine.running->lane] = x;
  meet(warp, [] {});
  return values;
}

uint32_t vote(Collective kind, bool x, Place place) {
  Warp& warp = join(kind, place);
  uint32_t& votes = warp.votes[warp.turn];
  const uint32_t self = 1u << machine.running->lane;
  if (warp.waiting == self) votes = 0;  // the first clears: all have read the votes of two collectives ago
  if (x) votes |= self;
  meet(warp, [] {});
  return votes;
}

void multiply_bytes(int32_t* d, const uint32_t* a, const uint32_t* b, Place place) {
  Warp& warp = join(Collective::kMultiplyBytes, place);
  warp.factors[machine.running->lane] = {d, a, b};
  meet(warp, [&] { multiply_fragments(warp); });
}

void multiply_signed(int32_t* d, const uint32_t* a, const uint32_t* b, Place place) {
  Warp& warp = join(Collective::kMultiplySigned, place);
  warp.factors[machine.running->lane] = {d, a, b};
  bool fits = true;
  meet(warp, [&] { fits = multiply_signed_fragments(warp); });
  if (!fits) fail("multiply_signed with a sum beyond int32", &place);
}

void load_matrices(uint32_t* to, int count, const void* row, Place place) {
  const int lane = machine.running->lane;
  if (lane < 8 * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
      fail("load_matrices from a misaligned address, must be a multiple of 16", &place);
    if (!within_objects(*machine.running->warp->block, row, 16))
      fail("load_matrices from an address outside of the block's shared memory", &place);
  }
  const uint64_t* const rows = exchange(Collective::kLoadMatrices, reinterpret_cast<uintptr_t>(row), place);
  for (int i = 0; i < count; ++i) {
    const auto* const from = reinterpret_cast<const unsigned char*>(rows[8 * i + lane / 4]);
    std::memcpy(&to[i], from + lane % 4 * 4, 4);
  }
}

int checked_lane_mask(int lanes, Place place) {
  if (lanes < 0 || lanes >= kLanes)
    fail("shuffle_xor with " + std::to_string(lanes) + ", must be in [0, 32)", &place);
  return lanes;
}

}  // namespace cu_fast::emulation
