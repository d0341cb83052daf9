// Hardware operations of a Hopper GPU (sm_90a) beyond device.h, one thin function each;
// csrc/emulation/hopper.h implements them on a CPU. Code that calls them stands between #ifdef
// CU_FAST_HAS_HOPPER and #endif.
//
// A barrier (mbarrier) is 8 bytes of shared memory. A phase completes when the barrier has had all its
// arrivals, and all bytes of copies that those arrivals announced; then the next phase begins. Phases count
// from 0. A phase's parity is its lowest bit.
//
// A warpgroup is four warps, the first a multiple of four. All its threads execute a multiply (wgmma)
// together. Multiplies are asynchronous. Until wait_multiplies says that one is complete, its d must be
// neither read nor written, and its a and its shared memory must not be written. Several multiplies into one
// d may be in flight: they run in order. Two d are the same registers, or have none in common.

#pragma once

#include "cuda/device.h"

#ifdef CU_FAST_EMULATED
#include "emulation/hopper.h"
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define CU_FAST_HAS_HOPPER

namespace cu_fast {

CU_FAST_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Called by one thread, followed by fence_barrier_init in that thread and a sync_block. Only then may the
// barrier be used.
CU_FAST_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// Makes initialised barriers visible to asynchronous copies too.
CU_FAST_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
CU_FAST_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces `bytes` of copy_bulk.
CU_FAST_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits until the barrier's phase with this parity completes (mbarrier.try_wait.parity): the current phase,
// or else the previous one, for which it returns at once.
CU_FAST_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The block's dynamic shared memory (launch.h): one object, uninitialised, 16-byte aligned.
template <class T>
CU_FAST_DEVICE T& dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_memory[];
  return *reinterpret_cast<T*>(dynamic_memory);
}

// Copies `bytes`, a multiple of 16, from global to shared memory asynchronously, both aligned to 16. The
// barrier counts the bytes as they arrive.
CU_FAST_DEVICE void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// The descriptor of a multiply's b in shared memory, without swizzle. b is made of core matrices of 8
// columns by 16 bytes of k, the columns one after the other. The core matrix of the next 16 bytes of k is
// `along_k` bytes away, that of the next 8 columns `along_columns`. Both, and the address, are multiples of
// 16 less than 2^18.
CU_FAST_DEVICE uint64_t describe_tile(const void* shared, int along_k, int along_columns) {
  return uint64_t{(shared_address(shared) & 0x3ffff) >> 4} |
         uint64_t{static_cast<uint32_t>(along_k) >> 4} << 16 |
         uint64_t{static_cast<uint32_t>(along_columns) >> 4} << 32;
}

// Makes this thread's writes to shared memory, those of copy_async that it has waited for too, visible to
// multiplies that are issued behind the next barrier: these read it as asynchronous copies do.
CU_FAST_DEVICE void fence_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Called by the warpgroup before the first multiply of each group: orders it after earlier accesses to its
// registers.
CU_FAST_DEVICE void fence_multiplies() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Before the first multiply and after the last wait: the compiler does not know that multiplies in flight still write
// to d, and must not move a copy of it across.
template <int kCount>
CU_FAST_DEVICE void fence_sums(int32_t (&d)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])::"memory");
  }
}
// Closes the group of the multiplies since the last commit.
CU_FAST_DEVICE void commit_multiplies() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending groups are in flight.
template <int kPending>
CU_FAST_DEVICE void wait_multiplies() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d += a b, 64 x 128 x 32, by a warpgroup: a unsigned bytes in registers, b signed bytes in shared memory
// (describe_tile), d int32, sums modulo 2^32. Warp w of the four has rows [16 w, 16 w + 16). The layouts of a
// and of d[column], 8 columns each, are those of multiply_bytes.
CU_FAST_DEVICE void multiply_tile(int32_t (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1;"
      : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]), "+r"(d[1][0]), "+r"(d[1][1]),
        "+r"(d[1][2]), "+r"(d[1][3]), "+r"(d[2][0]), "+r"(d[2][1]), "+r"(d[2][2]), "+r"(d[2][3]),
        "+r"(d[3][0]), "+r"(d[3][1]), "+r"(d[3][2]), "+r"(d[3][3]), "+r"(d[4][0]), "+r"(d[4][1]),
        "+r"(d[4][2]), "+r"(d[4][3]), "+r"(d[5][0]), "+r"(d[5][1]), "+r"(d[5][2]), "+r"(d[5][3]),
        "+r"(d[6][0]), "+r"(d[6][1]), "+r"(d[6][2]), "+r"(d[6][3]), "+r"(d[7][0]), "+r"(d[7][1]),
        "+r"(d[7][2]), "+r"(d[7][3]), "+r"(d[8][0]), "+r"(d[8][1]), "+r"(d[8][2]), "+r"(d[8][3]),
        "+r"(d[9][0]), "+r"(d[9][1]), "+r"(d[9][2]), "+r"(d[9][3]), "+r"(d[10][0]), "+r"(d[10][1]),
        "+r"(d[10][2]), "+r"(d[10][3]), "+r"(d[11][0]), "+r"(d[11][1]), "+r"(d[11][2]), "+r"(d[11][3]),
        "+r"(d[12][0]), "+r"(d[12][1]), "+r"(d[12][2]), "+r"(d[12][3]), "+r"(d[13][0]), "+r"(d[13][1]),
        "+r"(d[13][2]), "+r"(d[13][3]), "+r"(d[14][0]), "+r"(d[14][1]), "+r"(d[14][2]), "+r"(d[14][3]),
        "+r"(d[15][0]), "+r"(d[15][1]), "+r"(d[15][2]), "+r"(d[15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same with a signed and 64 columns, into set `set` of kSets. Sums must fit into d: the emulation checks it.
template <int kSets>
CU_FAST_DEVICE void multiply_signed_tile(int32_t (&d)[8][kSets][4], int set, const uint32_t (&a)[4],
                                         uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1;"
      : "+r"(d[0][set][0]), "+r"(d[0][set][1]), "+r"(d[0][set][2]), "+r"(d[0][set][3]), "+r"(d[1][set][0]),
        "+r"(d[1][set][1]), "+r"(d[1][set][2]), "+r"(d[1][set][3]), "+r"(d[2][set][0]), "+r"(d[2][set][1]),
        "+r"(d[2][set][2]), "+r"(d[2][set][3]), "+r"(d[3][set][0]), "+r"(d[3][set][1]), "+r"(d[3][set][2]),
        "+r"(d[3][set][3]), "+r"(d[4][set][0]), "+r"(d[4][set][1]), "+r"(d[4][set][2]), "+r"(d[4][set][3]),
        "+r"(d[5][set][0]), "+r"(d[5][set][1]), "+r"(d[5][set][2]), "+r"(d[5][set][3]), "+r"(d[6][set][0]),
        "+r"(d[6][set][1]), "+r"(d[6][set][2]), "+r"(d[6][set][3]), "+r"(d[7][set][0]), "+r"(d[7][set][1]),
        "+r"(d[7][set][2]), "+r"(d[7][set][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

}  // namespace cu_fast

#endif
