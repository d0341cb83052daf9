// The machine's state: blocks of warps of threads. One grid runs at a time.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulation/device.h"
#include "emulation/fiber.h"

namespace cu_fast::emulation {

inline constexpr int kLanes = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr int kMaxWarps = kMaxThreads / kLanes;
inline constexpr int kMaxResident = 4;
inline constexpr std::size_t kSharedBytes = 48 << 10;  // static shared memory of a block, on every GPU
inline constexpr std::size_t kMostShared = 227 << 10;  // with dynamic shared memory, on Hopper
inline constexpr std::size_t kMaxObjects = 32;
inline constexpr std::size_t kGapBytes = 32;  // between objects: a write beyond one is seen
inline constexpr std::size_t kGaps = (kMaxObjects + 1) * (kGapBytes + 16);
inline constexpr std::size_t kArenaBytes = kMostShared + kGaps;

// Poison: what shared memory holds before it is written. It is NaN in float, bfloat16 and half, a large int32
// that wins every maximum, and an index beyond every array. No byte of it is zero.
inline constexpr uint16_t kPoison = 0x7fa5;

class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  // splitmix64
  uint64_t operator()() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(((*this)() >> 32) * n >> 32); }

 private:
  uint64_t state_;
};

// A copy in flight: it lands when its thread waits for its group.
struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
  int64_t group;
  unsigned char bytes[16];
  Place place;
};

struct Warp;
struct Block;

struct Thread {
  Context context;
  Position position;
  Warp* warp;
  int lane;
  bool started;
  int64_t groups;  // closed so far
  std::vector<Copy> copies;
  uint32_t fences;  // calls of fence_writes
  Stack stack;
};

// Who wrote 16 bytes by copy_async, and its calls of fence_writes before: equal to those now, there was none since.
struct Landed {
  const Thread* thread;
  uint32_t fences;
};

// Masks have one bit per lane. A lane is ready, waits at a collective or at the block's barrier, has ended,
// or runs.
struct Warp {
  Block* block;
  uint32_t ready, waiting, at_barrier, ended;
  Collective collective;  // of the waiting lanes
  Place place, barrier_place;
  int runnable;  // position in the machine's list
  // Two sets, used in turn: a lane that is already at the next collective must not overwrite what slower
  // lanes have yet to read.
  int turn;
  uint64_t values[2][kLanes];
  uint32_t votes[2];
  struct {
    int32_t* d;
    const uint32_t *a, *b;
  } factors[kLanes];
  std::unique_ptr<Thread> threads[kLanes];
};

struct Object {
  const void* key;
  std::size_t begin, bytes;
};

struct Block {
  int x, y;
  int threads = 0, at_barrier, ended;
  std::size_t objects_count, shared_bytes;
  Object objects[kMaxObjects];
  Warp warps[kMaxWarps];
  alignas(64) unsigned char arena[kArenaBytes];
  Landed landed[kArenaBytes / 16];
};

struct Machine {
  Context host;
  Thread* running = nullptr;
  std::vector<Warp*> runnable;
  Warp* favourite;  // the scheduler stays with it for a while
  uint64_t restless;
  Random random;
  void (*body)(const void*);
  const void* context;
  std::size_t dynamic_shared;   // bytes, of the launch
  std::string kernel, failure;  // kernel: from start_kernel's place
  std::unique_ptr<Block> blocks[kMaxResident];
};

extern Machine machine;

// Marks lanes of a warp as able to run.
void make_ready(Warp& warp, uint32_t lanes);
// Lets others run until this thread is made ready and chosen.
void wait();
[[noreturn]] void fail(const std::string& reason, const Place* place);

// Joins the warp's collective. All lanes must be at the same one: a GPU does not define what divergent lanes
// do.
Warp& join(Collective kind, const Place& place);

// Called after a lane has stored its value; returns when all lanes have. The last lane runs `complete`.
template <class Complete>
void meet(Warp& warp, const Complete& complete) {
  if (warp.waiting == ~0u) {
    complete();
    warp.waiting = 0;
    warp.turn ^= 1;
    make_ready(warp, ~0u);
  }
  wait();
}

std::string position_text(const Position& at);
std::string text(const Place& place);
std::string text(Collective kind);

// shared.cpp
void poison_shared(Block& block);
// Whether nothing was written beyond the block's objects.
bool gaps_unwritten(const Block& block);
void check_ended_copies(const Thread& thread);
// Whether none of 128 bytes was written by a copy_async that its thread has not fenced since.
bool fenced(const Block& block, const unsigned char* at);
// Whether the bytes are within one of the block's objects.
bool within_objects(const Block& block, const void* at, std::size_t bytes);
void fill_with_poison(unsigned char* at, std::size_t bytes);

// multiply.cpp: d += a b for the 32 lanes' registers; and the product itself.
void multiply_fragments(const Warp& warp);
// The same with a signed. Returns whether every sum fits into its int32.
bool multiply_signed_fragments(const Warp& warp);
void multiply(const uint8_t (&a)[16][32], const int8_t (&b)[8][32], int32_t (&sums)[16][8]);
void multiply(const int8_t (&a)[16][32], const int8_t (&b)[8][32], int32_t (&sums)[16][8]);

// hopper.cpp and hopper_multiply.cpp. Forgets all barriers, copies and multiplies of a block; of all blocks
// if null.
void reset_hopper(const Block* block);
void reset_multiplies(const Block* block);
// Lands a copy, at random or if `needed`. Returns whether one has landed.
bool land_bulk_copy(bool needed);
// What a thread of the block waits for at a barrier; empty if none does.
std::string barrier_deadlock(const Block& block);
void check_ended_hopper(const Thread& thread);
void check_ended_multiplies(const Thread& thread);

}  // namespace cu_fast::emulation
