// Kernels that do what a GPU does not define, by name: misuse(name) must fail.

#pragma once

#include <cstring>
#include <string>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "emulation/machine.h"

namespace cu_fast {
namespace {

struct Bytes {
  alignas(16) unsigned char of[64];
};
struct TooMuch {
  unsigned char of[40 << 10];
};
struct MuchMore {
  unsigned char of[9 << 10];
};

enum class Misuse {
  kExitBeforeBarrier,
  kShuffleAgainstBarrier,
  kExitBeforeShuffle,
  kDifferentCollectives,
  kDifferentPlaces,
  kDifferentBarriers,
  kLoadMisaligned,
  kLoadShared,
  kCopyFromMisaligned,
  kCopyToMisaligned,
  kCopyOutside,
  kCopyBeyond,
  kCopyNotWaitedFor,
  kCopyNotClosed,
  kCopySourceWritten,
  kMatrixMisaligned,
  kMatrixOutside,
  kSignedOverflow,
  kSharedLimit,
  kSharedOverrun,
  kSharedUnderrun,
  kXorRange,
  kStackGuard,
  kBelowStack,
  kThrow,
  kNestedLaunch,
  kNothing,
};

struct Name {
  const char* name;
  Misuse misuse;
};

constexpr Name kMisuses[] = {
    {"exit before barrier", Misuse::kExitBeforeBarrier},
    {"shuffle against barrier", Misuse::kShuffleAgainstBarrier},
    {"exit before shuffle", Misuse::kExitBeforeShuffle},
    {"different collectives", Misuse::kDifferentCollectives},
    {"different places", Misuse::kDifferentPlaces},
    {"different barriers", Misuse::kDifferentBarriers},
    {"load misaligned", Misuse::kLoadMisaligned},
    {"load shared", Misuse::kLoadShared},
    {"copy from misaligned", Misuse::kCopyFromMisaligned},
    {"copy to misaligned", Misuse::kCopyToMisaligned},
    {"copy outside", Misuse::kCopyOutside},
    {"copy beyond", Misuse::kCopyBeyond},
    {"copy not waited for", Misuse::kCopyNotWaitedFor},
    {"copy not closed", Misuse::kCopyNotClosed},
    {"copy source written", Misuse::kCopySourceWritten},
    {"matrix misaligned", Misuse::kMatrixMisaligned},
    {"matrix outside", Misuse::kMatrixOutside},
    {"signed overflow", Misuse::kSignedOverflow},
    {"shared limit", Misuse::kSharedLimit},
    {"shared overrun", Misuse::kSharedOverrun},
    {"shared underrun", Misuse::kSharedUnderrun},
    {"xor range", Misuse::kXorRange},
    {"stack guard", Misuse::kStackGuard},
    {"below stack", Misuse::kBelowStack},
    {"throw", Misuse::kThrow},
    {"nested launch", Misuse::kNestedLaunch},
    {"nothing", Misuse::kNothing},
};

// Thread 37 of block (1, 2) does what the name says. memory: 64 global bytes, aligned.
CU_FAST_KERNEL(64, 1) misuse_kernel(Misuse misuse, unsigned char* memory) {
  start_kernel();
  Bytes& bytes = shared_memory<Bytes>();
  const bool me = thread_index() == 37 && block_index_x() == 1 && block_index_y() == 2;
  switch (misuse) {
    case Misuse::kExitBeforeBarrier:
      if (me) return;
      sync_block();
      break;
    case Misuse::kShuffleAgainstBarrier:
      if (me) {
        shuffle(1, 0);
      } else {
        sync_block();
      }
      break;
    case Misuse::kExitBeforeShuffle:
      if (me) return;
      shuffle(1, 0);
      break;
    case Misuse::kDifferentCollectives:
      if (me) {
        ballot(true);
      } else {
        any_lane(true);
      }
      break;
    case Misuse::kDifferentPlaces:
      if (me) {
        sync_warp();
      } else {
        sync_warp();
      }
      break;
    case Misuse::kDifferentBarriers:
      if (me) {
        sync_block();
      } else {
        sync_block();
      }
      break;
    case Misuse::kLoadMisaligned:
      if (me) load_streaming(memory + 8);
      break;
    case Misuse::kLoadShared:
      if (me) load_streaming(bytes.of);
      break;
    case Misuse::kCopyFromMisaligned:
      if (me) copy_async(bytes.of, memory + 4, true);
      break;
    case Misuse::kCopyToMisaligned:
      if (me) copy_async(bytes.of + 8, memory, true);
      break;
    case Misuse::kCopyOutside:
      if (me) copy_async(memory, memory + 16, true);
      break;
    case Misuse::kCopyBeyond:
      if (me) copy_async(bytes.of + sizeof(bytes.of), memory, true);
      break;
    case Misuse::kCopyNotWaitedFor:
      if (me) copy_async(bytes.of, memory, true);
      commit_copies();
      wait_copies<1>();
      break;
    case Misuse::kCopyNotClosed:
      if (me) copy_async(bytes.of, memory, true);
      wait_copies<0>();
      break;
    case Misuse::kCopySourceWritten:
      if (me) {
        copy_async(bytes.of, memory, true);
        memory[15] = 1;
      }
      commit_copies();
      wait_copies<0>();
      break;
    case Misuse::kMatrixMisaligned:
    case Misuse::kMatrixOutside: {
      const unsigned char* const wrong = misuse == Misuse::kMatrixOutside ? memory : bytes.of + 8;
      uint32_t to[4];
      load_matrices(to, me ? wrong : bytes.of);
      break;
    }
    case Misuse::kSignedOverflow: {
      const bool there = block_index_x() == 1 && block_index_y() == 2 && warp_index() == 1;
      int32_t d[4] = {0, 0, 0, there ? 0x7fffffff : 0};
      multiply_signed(d, {1, 1, 1, 1}, {1, 1});
      break;
    }
    case Misuse::kSharedLimit:
      if (me) {
        shared_memory<TooMuch>();
        shared_memory<MuchMore>();
      }
      break;
    case Misuse::kSharedOverrun:  // memory[0] is 0, unknown to the compiler
      if (me) *(bytes.of + sizeof(bytes.of) + memory[0]) = 1;
      break;
    case Misuse::kSharedUnderrun:
      if (me) *(bytes.of - 1 - memory[0]) = 1;
      break;
    case Misuse::kXorRange:
      shuffle_xor(1, me ? 32 : 1);
      break;
    case Misuse::kStackGuard:  // like a frame at the end of the stack
      if (me) std::memset(const_cast<char*>(emulation::machine.running->stack.low()), 0, 8);
      break;
    case Misuse::kBelowStack:  // like a frame beyond the end
      if (me) std::memset(const_cast<char*>(emulation::machine.running->stack.low()) - 1, 0, 1);
      break;
    case Misuse::kThrow:
      if (me) throw std::runtime_error("a reason");
      break;
    case Misuse::kNestedLaunch:
      if (me) launch(misuse_kernel, {1}, 32, nullptr, Misuse::kNothing, memory);
      break;
    case Misuse::kNothing:
      break;
  }
}

CU_FAST_KERNEL(64, 1) not_started_kernel() {}
CU_FAST_KERNEL(64, 1) late_start_kernel() {
  sync_warp();
  start_kernel();
}

void misuse(const std::string& name) {
  if (name == "not started") return launch(not_started_kernel, {1}, 32, nullptr);
  if (name == "late start") return launch(late_start_kernel, {1}, 32, nullptr);
  for (const Name& known : kMisuses) {
    if (name != known.name) continue;
    alignas(16) unsigned char memory[64] = {};
    return launch(misuse_kernel, {3, 4}, 64, nullptr, known.misuse, static_cast<unsigned char*>(memory));
  }
  throw std::invalid_argument("no such misuse: " + name);
}

}  // namespace
}  // namespace cu_fast
