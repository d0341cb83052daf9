// Shared memory, and the copies in flight to it; interface: device.h.

#include <algorithm>
#include <cstring>
#include <string>

#include "emulation/machine.h"

namespace cu_fast::emulation {
namespace {

bool within(const void* at, std::size_t bytes, const unsigned char* begin, std::size_t length) {
  const auto from = reinterpret_cast<uintptr_t>(begin), p = reinterpret_cast<uintptr_t>(at);
  return p >= from && p + bytes <= from + length;
}

// Of the arena that the launch needs: the rest stays as it is.
std::size_t arena_bytes() {
  return machine.dynamic_shared == 0 ? kSharedBytes + kGaps : kArenaBytes;
}

bool aligned(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

}  // namespace

void fill_with_poison(unsigned char* at, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += sizeof(kPoison)) std::memcpy(at + i, &kPoison, sizeof(kPoison));
}

bool within_objects(const Block& block, const void* at, std::size_t bytes) {
  for (std::size_t i = 0; i < block.objects_count; ++i) {
    const Object& object = block.objects[i];
    if (within(at, bytes, block.arena + object.begin, object.bytes)) return true;
  }
  return false;
}

void poison_shared(Block& block) {
  CU_FAST_PERMIT(block.arena, kArenaBytes);
  fill_with_poison(block.arena, arena_bytes());
  CU_FAST_FORBID(block.arena, kArenaBytes);
  std::fill_n(block.landed, arena_bytes() / 16, Landed{});
  block.objects_count = block.shared_bytes = 0;
}

bool gaps_unwritten(const Block& block) {
  CU_FAST_PERMIT(block.arena, kArenaBytes);
  std::size_t at = 0;
  const auto unwritten = [&](std::size_t end) {
    for (; at < end; at += sizeof(kPoison)) {
      if (std::memcmp(block.arena + at, &kPoison, sizeof(kPoison)) != 0) return false;
    }
    return true;
  };
  for (std::size_t i = 0; i < block.objects_count; ++i) {
    const Object& object = block.objects[i];
    if (!unwritten(object.begin)) return false;
    at = object.begin + object.bytes;
    at += at % sizeof(kPoison);
  }
  return unwritten(arena_bytes());
}

void* shared_object(const void* key, std::size_t bytes, bool dynamic) {
  if (!machine.running) fail("shared_memory", nullptr);
  Block& block = *machine.running->warp->block;
  std::size_t begin = kGapBytes;
  for (std::size_t i = 0; i < block.objects_count; ++i) {
    const Object& object = block.objects[i];
    if (object.key == key) return block.arena + object.begin;
    begin = object.begin + object.bytes + kGapBytes;
  }
  begin = (begin + 15) / 16 * 16;
  const std::size_t rounded = (bytes + 15) / 16 * 16;
  if (dynamic && rounded > machine.dynamic_shared) {
    fail("wants " + std::to_string(rounded) + " bytes of dynamic shared memory, launched with " +
             std::to_string(machine.dynamic_shared),
         nullptr);
  }
  if (!dynamic) block.shared_bytes += rounded;
  const std::size_t most = std::min(kSharedBytes, kMostShared - machine.dynamic_shared);
  if (block.shared_bytes > most || block.objects_count == kMaxObjects) {
    fail("wants " + std::to_string(block.shared_bytes) + " bytes of shared memory for " +
             std::to_string(block.objects_count + 1) + " objects; a block has " + std::to_string(most),
         nullptr);
  }
  block.objects[block.objects_count++] = {key, begin, bytes};
  CU_FAST_PERMIT(block.arena + begin, bytes);
  return block.arena + begin;
}

void check_global(const void* at, const char* what, Place place) {
  if (!machine.running) fail(what, &place);
  if (!aligned(at)) fail(std::string(what) + " from a misaligned address, must be a multiple of 16", &place);
  if (within(at, 1, machine.running->warp->block->arena, kArenaBytes)) {
    fail(std::string(what) + " from shared memory, must be global", &place);
  }
}

void copy_async(void* shared, const void* global, bool valid, Place place) {
  check_global(global, "copy_async", place);  // aligned even if it is not read
  if (!aligned(shared)) fail("copy_async to a misaligned address, must be a multiple of 16", &place);
  Thread& thread = *machine.running;
  if (!within_objects(*thread.warp->block, shared, 16))
    fail("copy_async to an address outside of the block's shared memory", &place);
  Copy copy = {shared, valid ? global : nullptr, thread.groups, {}, place};
  if (valid) std::memcpy(copy.bytes, global, 16);
  thread.copies.push_back(copy);
  // Until the copy lands, reading its destination is an error: a GPU guarantees neither the old nor the new
  // bytes.
  fill_with_poison(static_cast<unsigned char*>(shared), 16);
}

void commit_copies() {
  ++machine.running->groups;
}

void wait_copies(int pending) {
  Thread& thread = *machine.running;
  std::size_t landed = 0;
  for (; landed < thread.copies.size(); ++landed) {
    const Copy& copy = thread.copies[landed];
    if (copy.group >= thread.groups - pending) break;
    if (copy.from && std::memcmp(copy.from, copy.bytes, 16) != 0) {
      fail("copy_async from memory that was written before the copy had landed", &copy.place);
    }
    std::memcpy(copy.to, copy.bytes, 16);
    Block& block = *thread.warp->block;
    block.landed[(static_cast<unsigned char*>(copy.to) - block.arena) / 16] = {&thread, thread.fences};
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

bool fenced(const Block& block, const unsigned char* at) {
  const Landed* const landed = block.landed + (at - block.arena) / 16;
  return std::none_of(landed, landed + 8,
                      [](const Landed& copy) { return copy.thread && copy.fences == copy.thread->fences; });
}

void check_ended_copies(const Thread& thread) {
  if (thread.copies.empty()) return;
  const Copy& copy = thread.copies.front();
  const bool closed = copy.group < thread.groups;
  fail(std::string("ended and had not waited for copy_async") + (closed ? "" : " (nor closed its group)"),
       &copy.place);
}

}  // namespace cu_fast::emulation
