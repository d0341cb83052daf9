// The scheduler: runs a grid's threads in a random order, and reports why if none can run.

#include "emulation/machine.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "emulation/launch.h"

namespace cu_fast::emulation {

Machine machine;
const Position* position = nullptr;

namespace {

uint64_t seed = 0;
int64_t launches = 0;              // since the seed was set
std::set<std::string> ended_well;  // kernels, by signature

// The thread that runs next, nullptr if none can.
Thread* choose() {
  land_bulk_copy(false);
  while (machine.runnable.empty()) {
    if (!land_bulk_copy(true)) return nullptr;
  }
  const uint64_t random = machine.random();
  Warp* warp = machine.favourite;
  if (!warp || !warp->ready || (random & machine.restless) == 0) {
    warp = machine.runnable[(random >> 32) * machine.runnable.size() >> 32];
    machine.favourite = warp;
  }
  const int turn = static_cast<int>(random >> 24 & 31);
  const int lane = (std::countr_zero(std::rotr(warp->ready, turn)) + turn) & 31;
  warp->ready &= ~(1u << lane);
  if (!warp->ready) {
    Warp* const last = machine.runnable.back();
    machine.runnable[warp->runnable] = last;
    last->runnable = warp->runnable;
    machine.runnable.pop_back();
  }
  return warp->threads[lane].get();
}

void go_on(Context& from, Thread* thread, bool last) {
  machine.running = thread;
  position = thread ? &thread->position : nullptr;
  switch_context(from, thread ? thread->context : machine.host, last);
}

void thread_main() {
  entered();
  Thread& thread = *machine.running;
  std::string thrown;
  try {
    machine.body(machine.context);
  } catch (const std::exception& error) {
    thrown = error.what();
    if (thrown.empty()) thrown = "an exception";
  } catch (...) {
    thrown = "an exception";
  }
  // Outside of the handlers, because fail() and go_on() do not return here.
  if (!thrown.empty()) fail("threw: " + thrown, nullptr);
  if (!thread.started) fail("ended and had not called start_kernel", nullptr);
  if (!thread.stack.unwritten()) fail("overflowed its stack", nullptr);
  check_ended_copies(thread);
  check_ended_hopper(thread);
  Warp& warp = *thread.warp;
  warp.ended |= 1u << thread.lane;
  // The host starts another block in the place of one that has ended.
  go_on(thread.context, ++warp.block->ended == warp.block->threads ? nullptr : choose(), true);
  std::abort();
}

void start_block(Block& block, Grid2 grid, int64_t index, int threads) {
  block.x = static_cast<int>(index % grid.x);
  block.y = static_cast<int>(index / grid.x);
  block.threads = threads;
  block.at_barrier = block.ended = 0;
  poison_shared(block);
  reset_hopper(&block);
  for (int w = 0; w < threads / kLanes; ++w) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.ready = warp.waiting = warp.at_barrier = warp.ended = 0;
    warp.turn = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!warp.threads[lane]) warp.threads[lane] = std::make_unique<Thread>();
      Thread& thread = *warp.threads[lane];
      thread.position = {w * kLanes + lane, block.x, block.y, static_cast<int>(grid.x),
                         static_cast<int>(grid.y)};
      thread.warp = &warp;
      thread.lane = lane;
      thread.started = false;
      thread.groups = 0;
      thread.copies.clear();
      thread.fences = 0;
      thread.stack.prepare(thread.context, thread_main);
    }
    make_ready(warp, ~0u);
  }
}

std::string mask_text(uint32_t lanes) {
  std::ostringstream out;
  out << "0x" << std::hex << lanes;
  return out.str();
}

// What a stuck block waits for: all its threads wait or have ended. Warps come first, because a sync_block
// may wait for them.
std::string deadlock(const Block& block) {
  if (std::string out = barrier_deadlock(block); !out.empty()) return out;
  for (int w = 0; w < block.threads / kLanes; ++w) {
    const Warp& warp = block.warps[w];
    if (!warp.waiting) continue;
    const Thread& first = *warp.threads[std::countr_zero(warp.waiting)];
    std::string out = position_text(first.position) + " waits for ever at " + text(warp.collective) + " in " +
                      text(warp.place) + ", lanes " + mask_text(warp.waiting) + ", deadlock:";
    if (warp.ended) out += " lanes " + mask_text(warp.ended) + " have ended";
    if (warp.ended && warp.at_barrier) out += ",";
    if (warp.at_barrier) {
      out += " lanes " + mask_text(warp.at_barrier) + " wait at sync_block in " + text(warp.barrier_place);
    }
    return out;
  }
  for (int w = 0; w < block.threads / kLanes; ++w) {
    const Warp& warp = block.warps[w];
    if (!warp.at_barrier) continue;
    const Thread& first = *warp.threads[std::countr_zero(warp.at_barrier)];
    std::string out = position_text(first.position) + " waits for ever at sync_block in " +
                      text(warp.barrier_place) + ", deadlock: " + std::to_string(block.ended) +
                      " of the block's " + std::to_string(block.threads) + " threads have ended";
    for (int other = 0; other < block.threads / kLanes; ++other) {
      const uint32_t lanes = block.warps[other].ended;
      if (!lanes) continue;
      return out + ", the first of them thread " + std::to_string(other * kLanes + std::countr_zero(lanes));
    }
    return out;
  }
  return "deadlock";
}

void check_grid(Grid2 grid, BlockSize size) {
  const int threads = size.threads;
  const auto refuse = [](const std::string& what) { throw std::runtime_error("cu_fast emulation: " + what); };
  if (threads < kLanes || threads > kMaxThreads || threads % kLanes != 0) {
    refuse("a block of " + std::to_string(threads) + " threads, must be a multiple of 32 up to 1024");
  }
  if (size.dynamic_shared < 0 || size.dynamic_shared > static_cast<int>(kMostShared)) {
    refuse("a block with " + std::to_string(size.dynamic_shared) + " bytes of dynamic shared memory, of " +
           std::to_string(kMostShared));
  }
  if (grid.x < 1 || grid.x > 0x7fffffff || grid.y < 1 || grid.y > 65535) {
    refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
           " blocks, must be 1 x 1 to 2147483647 x 65535");
  }
}

}  // namespace

void make_ready(Warp& warp, uint32_t lanes) {
  if (!warp.ready) {
    warp.runnable = static_cast<int>(machine.runnable.size());
    machine.runnable.push_back(&warp);
  }
  warp.ready |= lanes;
}

void wait() {
  Thread* const self = machine.running;
  Thread* const next = choose();
  if (next != self) go_on(self->context, next, false);
}

void fail(const std::string& reason, const Place* place) {
  const std::string where = place ? " in " + text(*place) : "";
  if (!machine.running) throw std::runtime_error("cu_fast emulation: outside of a kernel: " + reason + where);
  machine.failure = position_text(machine.running->position) + ": " + reason + where;
  go_on(machine.running->context, nullptr, true);
  std::abort();
}

void fail(const char* reason, const Place* place) {
  fail(std::string(reason), place);
}

std::string position_text(const Position& at) {
  std::ostringstream out;
  out << "block (" << at.block_x << ", " << at.block_y << "), thread " << at.thread << " (warp "
      << at.thread / kLanes << ", lane " << at.thread % kLanes << ")";
  return out.str();
}

std::string text(const Place& place) {
  const std::string path = place.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(place.line());
}

std::string text(Collective kind) {
  constexpr const char* kNames[] = {"sync_warp",       "shuffle",           "shuffle_xor",
                                    "ballot",          "any_lane",          "multiply_bytes",
                                    "multiply_signed", "load_matrices",     "fence_multiplies",
                                    "multiply_tile",   "commit_multiplies", "wait_multiplies"};
  return kNames[static_cast<int>(kind)];
}

void run_grid(Grid2 grid, BlockSize size, void (*body)(const void*), const void* context) {
  static thread_local bool launching = false;
  if (launching) throw std::runtime_error("a kernel cannot launch a kernel");
  check_grid(grid, size);
  const int threads = size.threads;
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const struct Launching {
    Launching() { launching = true; }
    ~Launching() { launching = false; }
  } guard;
  Random random(seed * 0xd1342543de82ef95u + static_cast<uint64_t>(launches++));
  machine.random = Random(random());
  machine.host = Context();
  machine.runnable.clear();
  reset_hopper(nullptr);
  machine.favourite = nullptr;
  // How seldom the scheduler changes warps: from at every choice to only when a warp must wait, which leaves
  // the others far behind.
  constexpr uint64_t kRestless[] = {0, 0x7, 0x3f, 0x3ff};
  machine.restless = kRestless[random.below(4)];
  machine.body = body;
  machine.context = context;
  machine.dynamic_shared = static_cast<std::size_t>(size.dynamic_shared);
  machine.kernel = "its kernel has not called start_kernel";
  machine.failure.clear();

  std::vector<int64_t> order(grid.x * grid.y);
  std::iota(order.begin(), order.end(), int64_t{0});
  for (std::size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[random.below(static_cast<uint32_t>(i))]);
  }
  const auto resident = std::min<int64_t>(1 + random.below(kMaxResident), static_cast<int64_t>(order.size()));
  std::size_t started = 0, ended = 0;
  for (int64_t r = 0; r < resident; ++r) {
    if (!machine.blocks[r]) machine.blocks[r] = std::make_unique<Block>();
    start_block(*machine.blocks[r], grid, order[started++], threads);
  }
  while (ended < order.size() && machine.failure.empty()) {
    Thread* const next = choose();
    if (next) go_on(machine.host, next, false);
    if (!machine.failure.empty()) break;
    bool progress = false;
    for (int64_t r = 0; r < resident; ++r) {
      Block& block = *machine.blocks[r];
      if (block.ended != block.threads) continue;
      if (!gaps_unwritten(block)) {
        machine.failure = "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) +
                          "): wrote outside of its objects in shared memory";
        break;
      }
      progress = true;
      ++ended;
      if (started < order.size()) {
        start_block(block, grid, order[started++], threads);
      } else {
        block.ended = -1;  // already counted in `ended`
      }
    }
    if (!progress && !next && machine.failure.empty()) {
      for (int64_t r = 0; r < resident; ++r) {
        if (machine.blocks[r]->ended >= 0) machine.failure = deadlock(*machine.blocks[r]);
      }
    }
  }
  if (machine.failure.empty()) {
    ended_well.insert(machine.kernel);
    return;
  }
  std::ostringstream message;
  message << "cu_fast emulation: " << machine.failure << " [launch " << launches << " since seed " << seed
          << ", grid " << grid.x << " x " << grid.y << ", " << threads << " threads; " << machine.kernel
          << "]";
  throw std::runtime_error(message.str());
}

}  // namespace cu_fast::emulation

namespace cu_fast {
namespace {

int& multiprocessor_count() {
  static int count = [] {
    const char* const wanted = std::getenv("CU_FAST_EMULATED_MULTIPROCESSORS");
    return wanted ? std::max(1, std::atoi(wanted)) : 3;
  }();
  return count;
}

}  // namespace

void set_emulation_seed(uint64_t seed) {
  emulation::seed = seed;
  emulation::launches = 0;
}

std::string launched_kernels() {
  std::string lines;
  for (const std::string& kernel : std::exchange(emulation::ended_well, {})) lines += kernel + "\n";
  return lines;
}

int multiprocessors() {
  return multiprocessor_count();
}

void set_emulated_multiprocessors(int count) {
  if (count < 1) throw std::runtime_error("cu_fast emulation: at least one multiprocessor");
  multiprocessor_count() = count;
}

}  // namespace cu_fast
