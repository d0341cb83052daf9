// The hardware operations of cuda/device_sm90.h on a CPU. Multiplies end as late as a GPU may let them.
// Copies land then too, or at a random time before. What a GPU leaves undefined is an error where it is seen:
// hopper.cpp, hopper_multiply.cpp.

#pragma once

#include <cstdint>

#include "emulation/device.h"

#define CU_FAST_HAS_HOPPER

namespace cu_fast {
namespace emulation {

void barrier_init(uint64_t* barrier, int arrivals, Place place);
void fence_barrier_init(Place place);
void barrier_arrive(uint64_t* barrier, int bytes, Place place);
void barrier_wait(uint64_t* barrier, uint32_t parity, Place place);
void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, Place place);
uint64_t describe_tile(const void* shared, int along_k, int along_columns, Place place);
void fence_writes(Place place);
void fence_multiplies(Place place);
// Of d, 8 columns begin `stride` after those before.
struct TileShape {
  int columns, stride;
  bool is_signed;
};
void multiply_tile(int32_t* d, const uint32_t* a, uint64_t b, TileShape shape, Place place);
void commit_multiplies(Place place);
void wait_multiplies(int pending, Place place);

}  // namespace emulation

template <class T>
CU_FAST_DEVICE T& dynamic_shared_memory() {
  static_assert(alignof(T) <= 16 && std::is_trivially_copyable_v<T>);
  return *static_cast<T*>(emulation::shared_object(&emulation::type_key<T>, sizeof(T), true));
}

CU_FAST_DEVICE void barrier_init(uint64_t* barrier, int arrivals,
                                 emulation::Place place = emulation::Place::current()) {
  emulation::barrier_init(barrier, arrivals, place);
}
CU_FAST_DEVICE void fence_barrier_init(emulation::Place place = emulation::Place::current()) {
  emulation::fence_barrier_init(place);
}
CU_FAST_DEVICE void barrier_arrive(uint64_t* barrier, emulation::Place place = emulation::Place::current()) {
  emulation::barrier_arrive(barrier, 0, place);
}
CU_FAST_DEVICE void barrier_expect(uint64_t* barrier, int bytes,
                                   emulation::Place place = emulation::Place::current()) {
  emulation::barrier_arrive(barrier, bytes, place);
}
CU_FAST_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity,
                                 emulation::Place place = emulation::Place::current()) {
  emulation::barrier_wait(barrier, parity, place);
}
CU_FAST_DEVICE void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier,
                              emulation::Place place = emulation::Place::current()) {
  emulation::copy_bulk(shared, global, bytes, barrier, place);
}
CU_FAST_DEVICE uint64_t describe_tile(const void* shared, int along_k, int along_columns,
                                      emulation::Place place = emulation::Place::current()) {
  return emulation::describe_tile(shared, along_k, along_columns, place);
}
template <int kCount>
CU_FAST_DEVICE void fence_sums(int32_t (&)[kCount][4]) {}  // for the compiler of a GPU alone
CU_FAST_DEVICE void fence_writes(emulation::Place place = emulation::Place::current()) {
  emulation::fence_writes(place);
}
CU_FAST_DEVICE void fence_multiplies(emulation::Place place = emulation::Place::current()) {
  emulation::fence_multiplies(place);
}
CU_FAST_DEVICE void multiply_tile(int32_t (&d)[16][4], const uint32_t (&a)[4], uint64_t b,
                                  emulation::Place place = emulation::Place::current()) {
  emulation::multiply_tile(d[0], a, b, {128, 4, false}, place);
}
template <int kSets>
CU_FAST_DEVICE void multiply_signed_tile(int32_t (&d)[8][kSets][4], int set, const uint32_t (&a)[4],
                                         uint64_t b, emulation::Place place = emulation::Place::current()) {
  emulation::multiply_tile(d[0][set], a, b, {64, 4 * kSets, true}, place);
}
CU_FAST_DEVICE void commit_multiplies(emulation::Place place = emulation::Place::current()) {
  emulation::commit_multiplies(place);
}
template <int kPending>
CU_FAST_DEVICE void wait_multiplies(emulation::Place place = emulation::Place::current()) {
  static_assert(kPending >= 0 && kPending < 8, "wgmma.wait_group takes 0 to 7 groups");
  emulation::wait_multiplies(kPending, place);
}

}  // namespace cu_fast
