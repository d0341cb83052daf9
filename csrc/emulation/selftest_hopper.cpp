// Small kernels over numpy arrays for the intrinsics of Hopper: tests/test_emulation_hopper.py says what they
// must return, and which must fail.

#include <cstring>
#include <string>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/device_sm90.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace cu_fast {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

constexpr int kBytes = 24 << 10;

struct Tile {
  alignas(16) unsigned char bytes[kBytes];
};

// The two kinds of multiply, and their accumulators.
struct Unsigned {
  struct Sums {
    int32_t of[16][4];
  };
  static void multiply(Sums& d, const uint32_t (&a)[4], uint64_t b, emulation::Place place) {
    multiply_tile(d.of, a, b, place);
  }
};
// Into set 1 of 2; set 0 must stay as it is.
struct Signed {
  struct Sums {
    int32_t of[8][2][4];
  };
  static void multiply(Sums& d, const uint32_t (&a)[4], uint64_t b, emulation::Place place) {
    multiply_signed_tile(d.of, 1, a, b, place);
  }
};

// Two multiplies into one accumulator, and one into another. In d [4, threads, 16, 4] it leaves the first
// accumulator before wait_multiplies, after the first multiply and after both, and the other accumulator. a
// [2, threads, 4]: registers of both. b: what shared memory holds; `first` and `second`: where each tile
// begins.
template <class Kind>
CU_FAST_KERNEL(1024, 1)
multiply_kernel(int threads, const uint32_t* a, const unsigned char* b, int first, int second, int along_k,
                int along_columns, int32_t* d) {
  start_kernel();
  Tile& tile = shared_memory<Tile>();
  const int t = thread_index();
  for (int i = t; i < kBytes; i += threads) tile.bytes[i] = b[i];
  uint32_t factors[2][4];
  typename Kind::Sums sums, others;
  std::memcpy(factors[0], a + t * 4, sizeof(factors[0]));
  std::memcpy(factors[1], a + (threads + t) * 4, sizeof(factors[1]));
  std::memcpy(&sums, d + t * 64, sizeof(sums));
  std::memcpy(&others, d + (3 * threads + t) * 64, sizeof(others));
  fence_writes();
  sync_block();
  const auto place = [](emulation::Place here = emulation::Place::current()) { return here; };
  fence_multiplies();
  Kind::multiply(sums, factors[0], describe_tile(tile.bytes + first, along_k, along_columns), place());
  Kind::multiply(others, factors[1], describe_tile(tile.bytes + first, along_k, along_columns), place());
  commit_multiplies();
  fence_multiplies();
  Kind::multiply(sums, factors[1], describe_tile(tile.bytes + second, along_k, along_columns), place());
  commit_multiplies();
  std::memcpy(d + t * 64, &sums, sizeof(sums));
  wait_multiplies<1>();
  std::memcpy(d + (threads + t) * 64, &sums, sizeof(sums));
  std::memcpy(d + (3 * threads + t) * 64, &others, sizeof(others));
  wait_multiplies<0>();
  std::memcpy(d + (2 * threads + t) * 64, &sums, sizeof(sums));
}

void multiply_twice(bool is_signed, Array<uint32_t> a, Array<uint8_t> b, int first, int second, int along_k,
                    int along_columns, Array<int32_t> d) {
  const int threads = static_cast<int>(a.shape(1));
  launch(is_signed ? multiply_kernel<Signed> : multiply_kernel<Unsigned>, {1}, threads, nullptr, threads,
         a.data(), b.data(), first, second, along_k, along_columns, d.mutable_data());
}

// Thread 0 sends pieces of 48 bytes through a ring of two places, two copies per piece; all other threads
// read them.
struct Ring {
  alignas(16) unsigned char place[2][48];
  uint64_t full[2], empty[2];
};

CU_FAST_KERNEL(1024, 1)
ring_kernel(const unsigned char* in, int pieces, int readers, int early, unsigned char* out) {
  start_kernel();
  Ring& ring = shared_memory<Ring>();
  const int t = thread_index();
  if (t == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&ring.full[i], 1);
      barrier_init(&ring.empty[i], readers);
    }
    fence_barrier_init();
  }
  sync_block();
  for (int piece = 0; piece < pieces; ++piece) {
    const int place = piece % 2;
    const uint32_t parity = piece / 2 % 2;
    if (t == 0) {
      if (piece >= 2) barrier_wait(&ring.empty[place], parity ^ 1);
      // Copies may start before they are announced, as long as the phase lacks an arrival.
      if (early) copy_bulk(ring.place[place], in + 48 * piece, 32, &ring.full[place]);
      if (early) copy_bulk(ring.place[place] + 32, in + 48 * piece + 32, 16, &ring.full[place]);
      barrier_expect(&ring.full[place], 48);
      if (!early) copy_bulk(ring.place[place], in + 48 * piece, 32, &ring.full[place]);
      if (!early) copy_bulk(ring.place[place] + 32, in + 48 * piece + 32, 16, &ring.full[place]);
    } else {
      barrier_wait(&ring.full[place], parity);
      std::memcpy(out + (piece * readers + t - 1) * 48, ring.place[place], 48);
      barrier_arrive(&ring.empty[place]);
    }
  }
}

Array<uint8_t> ring(Array<uint8_t> in, int threads, bool early) {
  const int pieces = static_cast<int>(in.shape(0));
  Array<uint8_t> out(std::vector<py::ssize_t>{pieces, threads - 1, 48});
  launch(ring_kernel, {1}, threads, nullptr, in.data(), pieces, threads - 1, int{early}, out.mutable_data());
  return out;
}

// What a place holds before and after its copy has landed. A wait for the other parity returns at once.
CU_FAST_KERNEL(1024, 1) landing_kernel(const unsigned char* in, unsigned char* out) {
  start_kernel();
  Ring& ring = shared_memory<Ring>();
  if (thread_index() != 0) return;
  barrier_init(&ring.full[0], 2);
  fence_barrier_init();
  barrier_wait(&ring.full[0], 1);
  std::memset(ring.place, 1, sizeof(ring.place));
  barrier_expect(&ring.full[0], 32);
  copy_bulk(ring.place[0], in, 32, &ring.full[0]);
  std::memcpy(out, ring.place[0], 48);
  barrier_expect(&ring.full[0], 0);
  barrier_wait(&ring.full[0], 0);
  std::memcpy(out + 48, ring.place[0], 48);
}

Array<uint8_t> landing(Array<uint8_t> in) {
  Array<uint8_t> out(std::vector<py::ssize_t>{2, 48});
  launch(landing_kernel, {1}, 32, nullptr, in.data(), out.mutable_data());
  return out;
}

constexpr const char* kMisuses[] = {
    "nothing",           "not initialised",   "not fenced",      "initialised twice", "no arrivals",
    "written over",      "too many arrivals", "no expect",       "expect too much",   "expect too little",
    "wrong parity",      "parity 2",          "from misaligned", "to misaligned",     "15 bytes",
    "from shared",       "to outside",        "copies overlap",  "not waited for",    "barrier outside",
    "no multiply fence", "swizzle",           "tile outside",    "lanes differ",      "warps differ",
    "a warp less",       "places differ",     "not ended",       "not committed",     "a changed",
    "d changed",         "b changed",         "b on its way",    "described by 8",    "writes not fenced",
    "fenced before",     "signed overflow",   "dynamic beyond",  "static beyond",
};

struct Arena {
  alignas(16) unsigned char tile[8192];
  uint64_t barrier[4];
};

// Beyond what the launch, or a block beside its dynamic memory, has.
struct Dynamic {
  alignas(16) unsigned char of[1040];
};
struct Static {
  alignas(16) unsigned char of[3072];
};

// Thread 37, or the warpgroup, does what the name says. global: 8 KiB.
CU_FAST_KERNEL(1024, 1) misuse_kernel(int which, const unsigned char* global) {
  start_kernel();
  Arena& arena = shared_memory<Arena>();
  const std::string name = kMisuses[which];
  const bool chosen = thread_index() == 37;
  uint64_t* const barrier = &arena.barrier[0];
  if (chosen && name == "not initialised") barrier_arrive(barrier + 1);
  if (chosen && name == "barrier outside") barrier_init(barrier + 4, 1);
  if (chosen && name == "no arrivals") barrier_init(barrier + 2, 0);
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    barrier_init(barrier + 1, 1);
    if (name == "initialised twice") barrier_init(barrier, 1);
    if (name != "not fenced") fence_barrier_init();
  }
  for (int i = thread_index(); i < 8192; i += 128) arena.tile[i] = static_cast<unsigned char>(i * 7);
  sync_block();
  if (chosen && name == "written over") *barrier = 0;
  if (chosen && name == "too many arrivals") {
    barrier_expect(barrier, 16);
    barrier_arrive(barrier);
  }
  if (chosen && name == "parity 2") barrier_wait(barrier, 2);
  if (chosen) {
    const bool misaligned = name == "from misaligned", outside = name == "to outside";
    const int bytes = name == "15 bytes" ? 15 : 64;
    const int announced = name == "expect too much" ? 80 : name == "expect too little" ? 48 : bytes;
    unsigned char* const to = arena.tile + (outside ? 8192 : name == "to misaligned" ? 8 : 4096);
    const unsigned char* const from = name == "from shared" ? arena.tile : global + (misaligned ? 8 : 0);
    if (name != "no expect") barrier_expect(barrier, announced);
    copy_bulk(to, from, bytes, barrier);
    if (name == "copies overlap") copy_bulk(to + 48, from, 32, barrier);
    if (name != "not waited for" && name != "b on its way")
      barrier_wait(barrier, name == "wrong parity" ? 1 : 0);
  }
  if (name == "not waited for") return;
  if (name != "b on its way" && name != "wrong parity") sync_block();

  if (chosen && name == "dynamic beyond") dynamic_shared_memory<Dynamic>();
  if (chosen && name == "static beyond") shared_memory<Static>();
  if (name == "writes not fenced" || name == "fenced before") {
    if (chosen) copy_async(arena.tile + 112, global, true);
    if (name == "fenced before") fence_writes();
    commit_copies();
    wait_copies<0>();
    if (!chosen) fence_writes();
    sync_block();
  }

  int32_t d[16][4] = {};
  uint32_t a[4] = {1, 2, 3, 4};
  uint64_t b = describe_tile(arena.tile, name == "described by 8" ? 8 : 128, 256);
  if (name == "swizzle") b |= uint64_t{1} << 62;
  if (name == "tile outside") b = describe_tile(arena.tile, 128, 1024);
  if (name == "b on its way" || name == "wrong parity") b = describe_tile(arena.tile + 4096, 128, 256);
  if (name == "lanes differ" && chosen) b += 1;
  if (name == "warps differ" && warp_index() == 2) b -= uint64_t{128 >> 4} << 32;
  if (name == "a warp less" && warp_index() == 2) return;
  if (name != "no multiply fence") fence_multiplies();
  int32_t full[8][1][4] = {};
  if (name == "signed overflow") {
    full[7][0][3] = chosen ? 0x7fffffff : 0;
    for (int i = thread_index(); i < 8192; i += 128) arena.tile[i] = 1;
    fence_writes();
    sync_block();
    multiply_signed_tile(full, 0, a, b);
  }
  if (name == "places differ" && warp_index() == 1) {
    multiply_tile(d, a, b);
  } else {
    multiply_tile(d, a, b);
  }
  if (name == "a changed" && chosen) a[2] = 7;
  if (name == "d changed" && chosen) d[15][3] = 7;
  if (name == "b changed" && chosen) arena.tile[100] = 3;
  if (name != "not committed") commit_multiplies();
  if (name != "not ended") wait_multiplies<0>();
  if (chosen && name == "b on its way") barrier_wait(barrier, 0);
}

void misuse(const std::string& name) {
  for (int i = 0; i < static_cast<int>(std::size(kMisuses)); ++i) {
    if (name != kMisuses[i]) continue;
    alignas(16) static unsigned char global[8192] = {};
    const int dynamic = name == "dynamic beyond" ? 1024 : name == "static beyond" ? 216 << 10 : 0;
    return launch(misuse_kernel, {1}, {128, dynamic}, nullptr, i, static_cast<const unsigned char*>(global));
  }
  throw std::invalid_argument("no such misuse: " + name);
}

// A multiply by three warps: no whole warpgroup.
CU_FAST_KERNEL(1024, 1) few_warps_kernel() {
  start_kernel();
  Arena& arena = shared_memory<Arena>();
  int32_t d[16][4] = {};
  const uint32_t a[4] = {};
  fence_multiplies();
  multiply_tile(d, a, describe_tile(arena.tile, 128, 256));
  commit_multiplies();
  wait_multiplies<0>();
}

void few_warps() {
  launch(few_warps_kernel, {1}, 96, nullptr);
}

}  // namespace
}  // namespace cu_fast

PYBIND11_MODULE(_selftest_hopper, m) {
  using namespace cu_fast;
  m.attr("BYTES") = kBytes;
  m.attr("MISUSES") = py::cast(std::vector<std::string>(std::begin(kMisuses), std::end(kMisuses)));
  m.def("set_seed", &set_emulation_seed);
  m.def("multiply", &multiply_twice);
  m.def("ring", &ring);
  m.def("landing", &landing);
  m.def("misuse", &misuse);
  m.def("few_warps", &few_warps);
}
