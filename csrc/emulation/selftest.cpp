// Small kernels over numpy arrays, one per intrinsic: tests/test_emulation.py says what they must return.
// selftest_misuse.h has those that must fail.

#include <cstring>
#include <string>
#include <tuple>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "emulation/selftest_misuse.h"

namespace py = pybind11;

namespace cu_fast {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
Array<T> zeros(std::initializer_list<py::ssize_t> shape) {
  Array<T> made{std::vector<py::ssize_t>(shape)};
  std::memset(made.mutable_data(), 0, made.nbytes());
  return made;
}

CU_FAST_KERNEL(1024, 1) positions_kernel(int32_t* out) {
  start_kernel();
  const int threads = 64;
  const int block = block_index_y() * grid_size_x() + block_index_x();
  int32_t* const mine = out + (int64_t{block} * threads + thread_index()) * 7;
  mine[0] = thread_index();
  mine[1] = lane_index();
  mine[2] = warp_index();
  mine[3] = block_index_x();
  mine[4] = block_index_y();
  mine[5] = grid_size_x();
  mine[6] = grid_size_y();
}

Array<int32_t> positions(int x, int y) {
  auto out = zeros<int32_t>({x * y, 64, 7});
  launch(positions_kernel, {x, y}, 64, nullptr, out.mutable_data());
  return out;
}

// The order of the threads, twice: before and after a warp's barrier.
CU_FAST_KERNEL(1024, 1) order_kernel(int32_t* count, int32_t* out) {
  start_kernel();
  for (int round = 0; round < 2; ++round) {
    out[atomic_add(count, 1)] = block_index_x() * 256 + thread_index();
    sync_warp();
  }
}

Array<int32_t> order(int blocks) {
  int32_t count = 0;
  auto out = zeros<int32_t>({blocks * 256 * 2});
  launch(order_kernel, {blocks}, 256, nullptr, &count, out.mutable_data());
  return out;
}

template <class T>
CU_FAST_KERNEL(1024, 1)
shuffle_kernel(const T* x, const int32_t* lanes, T* out, bool exclusive_or) {
  start_kernel();
  const int t = thread_index();
  out[t] = exclusive_or ? shuffle_xor(x[t], lanes[t]) : shuffle(x[t], lanes[t]);
}

template <class T>
Array<T> shuffle_array(const Array<T>& x, const Array<int32_t>& lanes, bool exclusive_or) {
  auto out = zeros<T>({x.size()});
  launch(shuffle_kernel<T>, {1}, static_cast<int>(x.size()), nullptr, x.data(), lanes.data(),
         out.mutable_data(), exclusive_or);
  return out;
}

// Votes and shuffles in turn: x [rounds, threads] of 0 and 1, out [rounds, 3, threads].
CU_FAST_KERNEL(1024, 1) votes_kernel(const uint32_t* x, uint32_t* out, int rounds, int threads) {
  start_kernel();
  const int t = thread_index();
  for (int round = 0; round < rounds; ++round) {
    const uint32_t mine = x[round * threads + t];
    uint32_t* const to = out + round * 3 * threads + t;
    to[0] = ballot(mine != 0);
    to[threads] = any_lane(mine != 0);
    to[2 * threads] = shuffle(mine + static_cast<uint32_t>(t), lane_index() + 1);
  }
}

Array<uint32_t> votes(const Array<uint32_t>& x) {
  const auto rounds = static_cast<int>(x.shape(0)), threads = static_cast<int>(x.shape(1));
  auto out = zeros<uint32_t>({rounds, 3, threads});
  launch(votes_kernel, {1}, threads, nullptr, x.data(), out.mutable_data(), rounds, threads);
  return out;
}

// Rows: a b, a + b, a b + b.
CU_FAST_KERNEL(1024, 1) arithmetic_kernel(const float* a, const float* b, float* out, int n) {
  start_kernel();
  for (int i = thread_index(); i < n; i += 64) {
    out[i] = multiply(a[i], b[i]);
    out[n + i] = add(a[i], b[i]);
    out[2 * n + i] = add(multiply(a[i], b[i]), b[i]);
  }
}

Array<float> arithmetic(const Array<float>& a, const Array<float>& b) {
  auto out = zeros<float>({3, a.size()});
  launch(arithmetic_kernel, {1}, 64, nullptr, a.data(), b.data(), out.mutable_data(),
         static_cast<int>(a.size()));
  return out;
}

CU_FAST_KERNEL(1024, 1) bits_kernel(const uint32_t* x, int32_t* out) {
  start_kernel();
  out[thread_index()] = count_bits(x[thread_index()]);
}

Array<int32_t> bits(const Array<uint32_t>& x) {
  auto out = zeros<int32_t>({x.size()});
  launch(bits_kernel, {1}, static_cast<int>(x.size()), nullptr, x.data(), out.mutable_data());
  return out;
}

// x [blocks, threads]; before: what atomic_add returned.
CU_FAST_KERNEL(1024, 1)
atomics_kernel(const int32_t* x, int threads, int32_t* sum, uint32_t* bits, int64_t* wide, int32_t* before,
               uint32_t* bits_before) {
  start_kernel();
  const int i = block_index_x() * threads + thread_index();
  before[i] = atomic_add(sum, x[i]);
  bits_before[i] = atomic_or(bits, static_cast<uint32_t>(x[i]));
  atomic_add(wide, int64_t{x[i]} << 20);
}

py::tuple atomics(const Array<int32_t>& x) {
  int32_t sum = 0;
  uint32_t bits = 0;
  int64_t wide = 0;
  const auto threads = static_cast<int>(x.shape(1));
  auto before = zeros<int32_t>({x.shape(0), x.shape(1)});
  auto bits_before = zeros<uint32_t>({x.shape(0), x.shape(1)});
  launch(atomics_kernel, {x.shape(0)}, threads, nullptr, x.data(), threads, &sum, &bits, &wide,
         before.mutable_data(), bits_before.mutable_data());
  return py::make_tuple(sum, bits, wide, before, bits_before);
}

// The warp's registers: a [32, 4], b [32, 2], d [32, 4] -> d after `times` products.
CU_FAST_KERNEL(1024, 1)
multiply_bytes_kernel(const uint32_t* a, const uint32_t* b, const int32_t* d, int32_t* out, int times,
                      bool is_signed) {
  start_kernel();
  const int lane = lane_index();
  uint32_t my_a[4], my_b[2];
  int32_t my_d[4];
  for (int i = 0; i < 4; ++i) my_a[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) my_b[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) my_d[i] = d[lane * 4 + i];
  for (int i = 0; i < times; ++i) {
    if (is_signed) {
      multiply_signed(my_d, my_a, my_b);
    } else {
      multiply_bytes(my_d, my_a, my_b);
    }
  }
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = my_d[i];
}

Array<int32_t> multiply_registers(const Array<uint32_t>& a, const Array<uint32_t>& b, const Array<int32_t>& d,
                                  int times, bool is_signed) {
  auto out = zeros<int32_t>({32, 4});
  launch(multiply_bytes_kernel, {1}, 32, nullptr, a.data(), b.data(), d.data(), out.mutable_data(), times,
         is_signed);
  return out;
}

struct Rows {
  uint4 of[32];
};

// from [32, 4] in shared memory; lane i passes row rows[i]. out [32, 4].
CU_FAST_KERNEL(1024, 1) matrices_kernel(const uint4* from, const int32_t* rows, uint32_t* out, int count) {
  start_kernel();
  auto& shared = shared_memory<Rows>();
  const int lane = lane_index();
  shared.of[lane] = from[lane];
  sync_warp();
  if (count == 4) {
    uint32_t to[4];
    load_matrices(to, &shared.of[rows[lane]]);
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = to[i];
  } else {
    uint32_t to[2];
    load_matrices(to, &shared.of[rows[lane]]);
    for (int i = 0; i < 2; ++i) out[lane * 4 + i] = to[i];
  }
}

Array<uint32_t> matrices(const Array<uint32_t>& from, const Array<int32_t>& rows, int count) {
  auto out = zeros<uint32_t>({32, 4});
  launch(matrices_kernel, {1}, 32, nullptr, reinterpret_cast<const uint4*>(from.data()), rows.data(),
         out.mutable_data(), count);
  return out;
}

CU_FAST_KERNEL(1024, 1)
integers_kernel(const int64_t* x, const uint32_t* a, const uint32_t* b, float* rounded, int32_t* sums) {
  start_kernel();
  const int t = thread_index();
  rounded[t] = to_float(x[t]);
  sums[t] = dot_bytes(t, a[t], b[t]);
}

py::tuple integers(const Array<int64_t>& x, const Array<uint32_t>& a, const Array<uint32_t>& b) {
  auto rounded = zeros<float>({x.size()});
  auto sums = zeros<int32_t>({x.size()});
  launch(integers_kernel, {1}, static_cast<int>(x.size()), nullptr, x.data(), a.data(), b.data(),
         rounded.mutable_data(), sums.mutable_data());
  return py::make_tuple(rounded, sums);
}

// Each thread reads what a thread of the next warp wrote.
CU_FAST_KERNEL(1024, 1) neighbours_kernel(int32_t* out, bool barrier) {
  start_kernel();
  struct Values {
    int32_t of[256];
  };
  auto& values = shared_memory<Values>();
  values.of[thread_index()] = thread_index();
  if (barrier) sync_block();
  out[thread_index()] = values.of[(thread_index() + 32) % 256];
}

Array<int32_t> neighbours(bool barrier) {
  auto out = zeros<int32_t>({256});
  launch(neighbours_kernel, {1}, 256, nullptr, out.mutable_data(), barrier);
  return out;
}

struct Stages {
  uint4 of[3][64];
};

// Three groups of copies, then what shared memory holds after wait_copies<wait>; -1: without waiting.
CU_FAST_KERNEL(1024, 1) copies_kernel(const uint4* from, uint4* out, int wait, bool valid) {
  start_kernel();
  auto& stages = shared_memory<Stages>();
  const int t = thread_index();
  for (int i = 0; i < 3; ++i) {
    stages.of[i][t] = {1, 2, 3, 4};  // must not be read back: a copy may land at any time
    copy_async(&stages.of[i][t], from + i * 64 + t, valid || t % 2);
    commit_copies();
  }
  if (wait == 0) wait_copies<0>();
  if (wait == 1) wait_copies<1>();
  if (wait == 2) wait_copies<2>();
  for (int i = 0; i < 3; ++i) out[i * 64 + t] = stages.of[i][t];
  wait_copies<0>();
}

// from [3, 64, 4]
Array<uint32_t> copies(const Array<uint32_t>& from, int wait, bool valid) {
  auto out = zeros<uint32_t>({3, 64, 4});
  launch(copies_kernel, {1}, 64, nullptr, reinterpret_cast<const uint4*>(from.data()),
         reinterpret_cast<uint4*>(out.mutable_data()), wait, valid);
  return out;
}

CU_FAST_KERNEL(1024, 1) load_kernel(const uint4* from, uint4* out) {
  start_kernel();
  out[thread_index()] = load_streaming(from + thread_index());
}

// from [64, 4]
Array<uint32_t> load(const Array<uint32_t>& from) {
  auto out = zeros<uint32_t>({64, 4});
  launch(load_kernel, {1}, 64, nullptr, reinterpret_cast<const uint4*>(from.data()),
         reinterpret_cast<uint4*>(out.mutable_data()));
  return out;
}

struct Halves {
  uint16_t of[64 * 8];
};

// What shared memory holds at first. Each block then writes something else.
CU_FAST_KERNEL(1024, 1) fresh_kernel(uint16_t* out) {
  start_kernel();
  auto& halves = shared_memory<Halves>();
  for (int i = thread_index(); i < 64 * 8; i += 64) {
    out[block_index_x() * 64 * 8 + i] = halves.of[i];
    halves.of[i] = 1;
  }
}

Array<uint16_t> fresh(int blocks) {
  auto out = zeros<uint16_t>({blocks, 64 * 8});
  launch(fresh_kernel, {blocks}, 64, nullptr, out.mutable_data());
  return out;
}

struct Small {
  char of[3];
};
struct Wide {
  double of[9];
};

// Blocks that are resident together keep their own objects. out [blocks, threads, 2]: the addresses of two
// objects. Returns also the largest number of resident blocks, and how often a block did not read what it
// wrote.
CU_FAST_KERNEL(1024, 1) residents_kernel(int64_t* out, int32_t* now, int32_t* most, int32_t* wrong) {
  start_kernel();
  auto& small = shared_memory<Small>();
  auto& wide = shared_memory<Wide>();
  const int block = block_index_x();
  if (thread_index() == 0) {
    const int32_t before = atomic_add(now, 1);
    if (before + 1 > *most) *most = before + 1;
    small.of[2] = static_cast<char>(block);
    wide.of[8] = block;
  }
  for (int i = 0; i < 8; ++i) {
    sync_block();
    if (small.of[2] != block || wide.of[8] != block) atomic_add(wrong, 1);
  }
  int64_t* const mine = out + (block * 64 + thread_index()) * 2;
  mine[0] = reinterpret_cast<int64_t>(&small);
  mine[1] = reinterpret_cast<int64_t>(&wide);
  sync_block();
  if (thread_index() == 0) atomic_add(now, -1);
}

py::tuple residents(int blocks) {
  auto out = zeros<int64_t>({blocks, 64, 2});
  int32_t now = 0, most = 0, wrong = 0;
  launch(residents_kernel, {blocks}, 64, nullptr, out.mutable_data(), &now, &most, &wrong);
  return py::make_tuple(out, most, wrong);
}

void empty(int64_t x, int64_t y, int threads) {
  launch(+[] { start_kernel(); }, {x, y}, threads, nullptr);
}

}  // namespace
}  // namespace cu_fast

PYBIND11_MODULE(_selftest, m) {
  using namespace cu_fast;
  m.def("set_seed", &set_emulation_seed);
  m.def("multiprocessors", &multiprocessors);
  m.def("set_multiprocessors", &set_emulated_multiprocessors);
  m.def("positions", &positions);
  m.def("order", &order);
  // One function per dtype, under numpy's name for it.
  m.def("shuffle_float32", &shuffle_array<float>);
  m.def("shuffle_float64", &shuffle_array<double>);
  m.def("shuffle_int32", &shuffle_array<int32_t>);
  m.def("shuffle_uint64", &shuffle_array<uint64_t>);
  m.def("votes", &votes);
  m.def("arithmetic", &arithmetic);
  m.def("count_bits", &bits);
  m.def("atomics", &atomics);
  m.def("multiply_bytes", &multiply_registers);
  m.def("load_matrices", &matrices);
  m.def("integers", &integers);
  m.def("neighbours", &neighbours);
  m.def("copies", &copies);
  m.def("load_streaming", &load);
  m.def("fresh", &fresh);
  m.def("residents", &residents);
  m.def("empty", &empty);
  m.def("misuse", &misuse);
}
