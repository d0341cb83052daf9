// The hardware operations of cuda/device.h on a CPU: the same names with the same meaning. Each CUDA thread
// is a fiber (fiber.h). machine.cpp runs them in a random order; what a GPU leaves undefined is an error.
//
// Two things differ from a GPU. A thread runs until it waits for others or ends, so a kernel must not spin on
// memory that another thread writes. Only code that runs is checked: a shared-memory object counts towards
// the limit when shared_memory is called.

#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "emulation/vector_types.h"

#define CU_FAST_KERNEL(threads, blocks_per_sm) void
#define CU_FAST_DEVICE inline

namespace cu_fast {
namespace emulation {

// Where a kernel calls a collective; error messages name it.
using Place = std::source_location;

enum class Collective : uint8_t {
  kSyncWarp,
  kShuffle,
  kShuffleXor,
  kBallot,
  kAnyLane,
  kMultiplyBytes,
  kMultiplySigned,
  kLoadMatrices,
  kFenceMultiplies,
  kMultiplyTile,
  kCommitMultiplies,
  kWaitMultiplies,
};

struct Position {
  int thread, block_x, block_y, grid_x, grid_y;
};

extern const Position* position;  // of the running thread

// A different address for every type.
template <class T>
inline char type_key = 0;

void* shared_object(const void* key, std::size_t bytes, bool dynamic);
void sync_block(Place place);
void sync_warp(Place place);
// Returns the values of all 32 lanes, valid until this lane's next collective.
const uint64_t* exchange(Collective kind, uint64_t x, Place place);
uint32_t vote(Collective kind, bool x, Place place);
void multiply_bytes(int32_t* d, const uint32_t* a, const uint32_t* b, Place place);
void multiply_signed(int32_t* d, const uint32_t* a, const uint32_t* b, Place place);
void load_matrices(uint32_t* to, int count, const void* row, Place place);
void check_global(const void* at, const char* what, Place place);
void copy_async(void* shared, const void* global, bool valid, Place place);
void commit_copies();
void wait_copies(int pending);
void start_kernel(Place place);
int checked_lane_mask(int lanes, Place place);
// Ends the launch: the running thread's position and the reason become a std::runtime_error out of launch().
[[noreturn]] void fail(const char* reason, const Place* place);

template <class T>
T exchanged(Collective kind, T x, int from_lane, Place place) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a type of 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = exchange(kind, bits, place)[from_lane];
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

}  // namespace emulation

CU_FAST_DEVICE int thread_index() {
  return emulation::position->thread;
}
CU_FAST_DEVICE int lane_index() {
  return emulation::position->thread % 32;
}
CU_FAST_DEVICE int warp_index() {
  return emulation::position->thread / 32;
}
CU_FAST_DEVICE int block_index_x() {
  return emulation::position->block_x;
}
CU_FAST_DEVICE int block_index_y() {
  return emulation::position->block_y;
}
CU_FAST_DEVICE int grid_size_x() {
  return emulation::position->grid_x;
}
CU_FAST_DEVICE int grid_size_y() {
  return emulation::position->grid_y;
}

template <class T>
CU_FAST_DEVICE T& shared_memory() {
  static_assert(alignof(T) <= 16 && std::is_trivially_copyable_v<T>,
                "shared memory is raw bytes, 16-byte aligned");
  return *static_cast<T*>(emulation::shared_object(&emulation::type_key<T>, sizeof(T), false));
}

CU_FAST_DEVICE void sync_block(emulation::Place place = emulation::Place::current()) {
  emulation::sync_block(place);
}
CU_FAST_DEVICE void sync_warp(emulation::Place place = emulation::Place::current()) {
  emulation::sync_warp(place);
}

// As on a GPU, from_lane counts modulo 32.
template <class T>
CU_FAST_DEVICE T shuffle(T x, int from_lane, emulation::Place place = emulation::Place::current()) {
  return emulation::exchanged(emulation::Collective::kShuffle, x, from_lane & 31, place);
}
template <class T>
CU_FAST_DEVICE T shuffle_xor(T x, int lanes, emulation::Place place = emulation::Place::current()) {
  const int from_lane = lane_index() ^ emulation::checked_lane_mask(lanes, place);
  return emulation::exchanged(emulation::Collective::kShuffleXor, x, from_lane, place);
}
CU_FAST_DEVICE uint32_t ballot(bool x, emulation::Place place = emulation::Place::current()) {
  return emulation::vote(emulation::Collective::kBallot, x, place);
}
CU_FAST_DEVICE bool any_lane(bool x, emulation::Place place = emulation::Place::current()) {
  return emulation::vote(emulation::Collective::kAnyLane, x, place) != 0;
}

CU_FAST_DEVICE int count_bits(uint32_t x) {
  return std::popcount(x);
}
CU_FAST_DEVICE int count_leading_zeros(uint32_t x) {
  return std::countl_zero(x);
}

// Compiled with -ffp-contract=off.
CU_FAST_DEVICE float multiply(float a, float b) {
  return a * b;
}
CU_FAST_DEVICE float add(float a, float b) {
  return a + b;
}

CU_FAST_DEVICE float fuse(float a, float b, float c) {
  return std::fma(a, b, c);
}

CU_FAST_DEVICE int computed_here(int x) {
  return x;
}

CU_FAST_DEVICE float to_float(int64_t x) {
  return static_cast<float>(x);
}

// A sum beyond int32 is an error of the sanitizer: no kernel relies on wrapping here.
CU_FAST_DEVICE int32_t dot_bytes(int32_t sum, uint32_t a, uint32_t b) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
}

// Plain operations: no other thread runs meanwhile. Sums wrap, as on a GPU.
CU_FAST_DEVICE int32_t atomic_add(int32_t* at, int32_t x) {
  const int32_t before = *at;
  *at = static_cast<int32_t>(static_cast<uint32_t>(before) + static_cast<uint32_t>(x));
  return before;
}
CU_FAST_DEVICE uint32_t atomic_or(uint32_t* at, uint32_t x) {
  const uint32_t before = *at;
  *at = before | x;
  return before;
}
CU_FAST_DEVICE void atomic_add(int64_t* at, int64_t x) {
  *at = static_cast<int64_t>(static_cast<uint64_t>(*at) + static_cast<uint64_t>(x));
}

CU_FAST_DEVICE uint4 load_streaming(const void* at, emulation::Place place = emulation::Place::current()) {
  emulation::check_global(at, "load_streaming", place);
  uint4 x;
  std::memcpy(&x, at, sizeof(x));
  return x;
}

CU_FAST_DEVICE void copy_async(void* shared, const void* global, bool valid,
                               emulation::Place place = emulation::Place::current()) {
  emulation::copy_async(shared, global, valid, place);
}
CU_FAST_DEVICE void commit_copies() {
  emulation::commit_copies();
}
template <int kPending>
CU_FAST_DEVICE void wait_copies() {
  static_assert(kPending >= 0, "cp.async.wait_group takes 0 or more groups");
  emulation::wait_copies(kPending);
}

CU_FAST_DEVICE void multiply_bytes(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                   emulation::Place place = emulation::Place::current()) {
  emulation::multiply_bytes(d, a, b, place);
}

CU_FAST_DEVICE void multiply_signed(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    emulation::Place place = emulation::Place::current()) {
  emulation::multiply_signed(d, a, b, place);
}

template <int kCount>
CU_FAST_DEVICE void load_matrices(uint32_t (&to)[kCount], const void* row,
                                  emulation::Place place = emulation::Place::current()) {
  static_assert(kCount == 2 || kCount == 4);
  emulation::load_matrices(to, kCount, row, place);
}

CU_FAST_DEVICE void start_kernel(emulation::Place place = emulation::Place::current()) {
  emulation::start_kernel(place);
}

}  // namespace cu_fast
