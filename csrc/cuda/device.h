// The hardware operations of the kernels, one thin function each. Under nvcc they are intrinsics and PTX;
// with CU_FAST_EMULATED csrc/emulation implements them, and the same kernels run on a CPU.
//
// All 32 lanes of a warp must take part in an operation of the warp (sync_warp, shuffle, ballot, ...), and
// all threads of a block in sync_block. Blocks are one-dimensional and consist of whole warps.

#pragma once

#include <cstdint>

#ifdef CU_FAST_EMULATED
#include "emulation/device.h"
#else

#include <cuda_runtime.h>

namespace cu_fast {

#define CU_FAST_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define CU_FAST_DEVICE __device__ __forceinline__

CU_FAST_DEVICE int thread_index() {
  return threadIdx.x;
}
CU_FAST_DEVICE int lane_index() {
  return threadIdx.x % 32;
}
CU_FAST_DEVICE int warp_index() {
  return threadIdx.x / 32;
}
CU_FAST_DEVICE int block_index_x() {
  return blockIdx.x;
}
CU_FAST_DEVICE int block_index_y() {
  return blockIdx.y;
}
CU_FAST_DEVICE int grid_size_x() {
  return gridDim.x;
}
CU_FAST_DEVICE int grid_size_y() {
  return gridDim.y;
}

// The block's shared memory of this type: one object, uninitialised, 16-byte aligned.
template <class T>
CU_FAST_DEVICE T& shared_memory() {
  __shared__ alignas(16) unsigned char memory[sizeof(T)];
  return *reinterpret_cast<T*>(memory);
}

CU_FAST_DEVICE void sync_block() {
  __syncthreads();
}
CU_FAST_DEVICE void sync_warp() {
  __syncwarp();
}

inline constexpr uint32_t kWholeWarp = 0xffffffffu;

// T is a type of 4 or 8 bytes.
template <class T>
CU_FAST_DEVICE T shuffle(T x, int from_lane) {
  return __shfl_sync(kWholeWarp, x, from_lane);
}
template <class T>
CU_FAST_DEVICE T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(kWholeWarp, x, lanes);
}
CU_FAST_DEVICE uint32_t ballot(bool x) {
  return __ballot_sync(kWholeWarp, x);
}
CU_FAST_DEVICE bool any_lane(bool x) {
  return __any_sync(kWholeWarp, x);
}

CU_FAST_DEVICE int count_bits(uint32_t x) {
  return __popc(x);
}
CU_FAST_DEVICE int count_leading_zeros(uint32_t x) {
  return __clz(static_cast<int>(x));
}

// The product and the sum of fp32, each rounded: never fused (see also -fmad=false).
CU_FAST_DEVICE float multiply(float a, float b) {
  return __fmul_rn(a, b);
}
CU_FAST_DEVICE float add(float a, float b) {
  return __fadd_rn(a, b);
}

// a b + c, rounded once: for bounds alone, as no score is fused.
CU_FAST_DEVICE float fuse(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}

// x, but the compiler does not know it: what depends on it is not computed before this point, where registers
// may be scarce.
CU_FAST_DEVICE int computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Rounded to the nearest, ties to even.
CU_FAST_DEVICE float to_float(int64_t x) {
  return __ll2float_rn(x);
}

// sum + the dot product of four signed bytes.
CU_FAST_DEVICE int32_t dot_bytes(int32_t sum, uint32_t a, uint32_t b) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}

// Atomic in global or shared memory, relaxed. The 32-bit ones return the old value.
CU_FAST_DEVICE int32_t atomic_add(int32_t* at, int32_t x) {
  return atomicAdd(at, x);
}
CU_FAST_DEVICE uint32_t atomic_or(uint32_t* at, uint32_t x) {
  return atomicOr(at, x);
}
CU_FAST_DEVICE void atomic_add(int64_t* at, int64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(x));  // modulo 2^64
}

// Loads 16 bytes at an aligned address without filling the L1 cache: for data that is read once.
CU_FAST_DEVICE uint4 load_streaming(const void* at) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(at));
  return x;
}

// Copies 16 bytes from global to shared memory asynchronously, both aligned; writes zeros if not valid.
// commit_copies closes a group of copies. wait_copies<n> waits until at most n groups are in flight. Then the
// thread sees its own copies; other threads see them after a barrier.
CU_FAST_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
CU_FAST_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
CU_FAST_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// d += a b, 16 x 8 x 32, by a warp: a unsigned bytes, b signed, d int32, sums modulo 2^32. A register of a or
// b holds four neighbours in k. With g = lane / 4 and q = lane % 4:
//   a[0] rows g,     k = 4 q .. 4 q + 3        a[2] rows g,     k = 16 + 4 q ..
//   a[1] rows g + 8, k = 4 q ..                a[3] rows g + 8, k = 16 + 4 q ..
//   b[0] k = 4 q .., column g                  b[1] k = 16 + 4 q .., column g
//   d[0], d[1] row g, columns 2 q, 2 q + 1     d[2], d[3] row g + 8
CU_FAST_DEVICE void multiply_bytes(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with a signed. Sums must fit into d: the emulation checks it.
CU_FAST_DEVICE void multiply_signed(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads kCount matrices of 8 rows of 16 bytes from shared memory, by a warp: lane 8 i + r passes the address of
// row r of matrix i. to[i] is word lane % 4 of row lane / 4 of matrix i, which are the layouts of a and b above.
template <int kCount>
CU_FAST_DEVICE void load_matrices(uint32_t (&to)[kCount], const void* row) {
  static_assert(kCount == 2 || kCount == 4);
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  }
}

// Every kernel calls this first. It lets the next kernel of the stream be set up, and returns when the writes
// of the previous kernels are visible (programmatic dependent launch; sm_90 and newer).
CU_FAST_DEVICE void start_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace cu_fast

#endif
