// Barriers in shared memory, and the bulk copies that they count; interface: hopper.h, meaning:
// cuda/device_sm90.h.
//
// A barrier's 8 bytes hold a mark; its state is kept here. A copy's destination holds poison (machine.h)
// until the copy lands: at a random time, or when no thread can run.

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "emulation/hopper.h"
#include "emulation/launch.h"
#include "emulation/machine.h"

namespace cu_fast::emulation {
namespace {

constexpr uint64_t kMark = 0x7265697272616221;

struct Waiting {
  Thread* thread;
  Place place;
};

struct Barrier {
  Thread* maker;
  bool fenced;
  int arrivals, pending;
  int64_t bytes;  // announced, not yet copied
  uint32_t phase;
  std::vector<Waiting> waiting;
};

struct BulkCopy {
  const Block* block;
  unsigned char* to;
  const void* from;
  int bytes;
  uint64_t* barrier;
  Place place;
};

std::map<uint64_t*, Barrier> barriers;
std::vector<BulkCopy> copies;

// A copy lands at one in `patience` choices of the scheduler; 0: only when no thread can run.
uint32_t patience;

bool chosen = true;  // what emulated_hopper() returns

Barrier& barrier_of(uint64_t* at, const char* what, const Place& place) {
  if (!machine.running) fail(what, &place);
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail(std::string(what) + " of a barrier that was not initialised", &place);
  if (*at != kMark) fail(std::string(what) + " of a barrier that was written over", &place);
  if (!found->second.fenced && found->second.maker != machine.running) {
    fail(std::string(what) + " of a barrier whose maker has not called fence_barrier_init", &place);
  }
  return found->second;
}

// Ends the phase if all its arrivals and all announced bytes are there.
void settle(Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  for (const Waiting& waiting : barrier.waiting)
    make_ready(*waiting.thread->warp, 1u << waiting.thread->lane);
  barrier.waiting.clear();
}

}  // namespace

void reset_hopper(const Block* block) {
  const auto ours = [&](const void* at) {
    const auto* const byte = static_cast<const unsigned char*>(at);
    return !block || (byte >= block->arena && byte < block->arena + kArenaBytes);
  };
  std::erase_if(barriers, [&](const auto& barrier) { return ours(barrier.first); });
  std::erase_if(copies, [&](const BulkCopy& copy) { return ours(copy.to); });
  reset_multiplies(block);
  if (block) return;
  constexpr uint32_t kPatience[] = {4, 64, 1024, 0};
  patience = kPatience[machine.random.below(4)];
}

bool land_bulk_copy(bool needed) {
  if (copies.empty()) return false;
  if (!needed && (patience == 0 || machine.random.below(patience) != 0)) return false;
  const std::size_t which = machine.random.below(static_cast<uint32_t>(copies.size()));
  const BulkCopy copy = copies[which];
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(which));
  std::memcpy(copy.to, copy.from, copy.bytes);
  Barrier& barrier = barriers.at(copy.barrier);
  barrier.bytes -= copy.bytes;
  settle(barrier);
  return true;
}

std::string barrier_deadlock(const Block& block) {
  for (const auto& [at, barrier] : barriers) {
    for (const Waiting& waiting : barrier.waiting) {
      if (waiting.thread->warp->block != &block) continue;
      return position_text(waiting.thread->position) + " waits for ever at barrier_wait in " +
             text(waiting.place) + ", deadlock: phase " + std::to_string(barrier.phase) + " lacks " +
             std::to_string(barrier.pending) + " of " + std::to_string(barrier.arrivals) + " arrivals and " +
             std::to_string(barrier.bytes) + " bytes";
    }
  }
  return "";
}

void check_ended_hopper(const Thread& thread) {
  check_ended_multiplies(thread);
  const Block& block = *thread.warp->block;
  if (block.ended + 1 < block.threads) return;
  for (const BulkCopy& copy : copies) {
    if (copy.block == &block) fail("the block ended and had not waited for copy_bulk", &copy.place);
  }
}

void barrier_init(uint64_t* at, int arrivals, Place place) {
  if (!machine.running) fail("barrier_init", &place);
  if (!within_objects(*machine.running->warp->block, at, sizeof(*at))) {
    fail("barrier_init outside of the block's shared memory", &place);
  }
  if (barriers.contains(at)) fail("barrier_init of a barrier that was initialised before", &place);
  if (arrivals < 1 || arrivals >= 1 << 20)
    fail("barrier_init for " + std::to_string(arrivals) + " arrivals", &place);
  *at = kMark;
  barriers[at] = {machine.running, false, arrivals, arrivals, 0, 0, {}};
}

void fence_barrier_init(Place place) {
  if (!machine.running) fail("fence_barrier_init", &place);
  for (auto& [at, barrier] : barriers) barrier.fenced |= barrier.maker == machine.running;
}

void barrier_arrive(uint64_t* at, int bytes, Place place) {
  Barrier& barrier = barrier_of(at, "an arrival", place);
  if (bytes < 0 || bytes >= 1 << 20) fail("barrier_expect of " + std::to_string(bytes) + " bytes", &place);
  if (barrier.pending == 0) fail("one more arrival than the barrier's phase has", &place);
  --barrier.pending;
  barrier.bytes += bytes;
  settle(barrier);
}

void barrier_wait(uint64_t* at, uint32_t parity, Place place) {
  Barrier& barrier = barrier_of(at, "barrier_wait", place);
  if (parity > 1) fail("barrier_wait for parity " + std::to_string(parity), &place);
  while (barrier.phase % 2 == parity) {
    barrier.waiting.push_back({machine.running, place});
    wait();
  }
}

void copy_bulk(void* shared, const void* global, int bytes, uint64_t* at, Place place) {
  check_global(global, "copy_bulk", place);
  barrier_of(at, "copy_bulk", place);
  const Block& block = *machine.running->warp->block;
  if (bytes <= 0 || bytes % 16 != 0) {
    fail("copy_bulk of " + std::to_string(bytes) + " bytes, must be a multiple of 16", &place);
  }
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) {
    fail("copy_bulk to a misaligned address, must be a multiple of 16", &place);
  }
  if (!within_objects(block, shared, bytes))
    fail("copy_bulk to outside of the block's shared memory", &place);
  auto* const to = static_cast<unsigned char*>(shared);
  for (const BulkCopy& copy : copies) {
    if (to < copy.to + copy.bytes && copy.to < to + bytes) {
      fail("copy_bulk to where another one is on its way from " + text(copy.place), &place);
    }
  }
  fill_with_poison(to, bytes);
  copies.push_back({&block, to, global, bytes, at, place});
}

}  // namespace cu_fast::emulation

namespace cu_fast {

bool emulated_hopper() {
  return emulation::chosen;
}

void set_emulated_hopper(bool chosen) {
  emulation::chosen = chosen;
}

}  // namespace cu_fast
