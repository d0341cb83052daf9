// Peak rates of the machine, with which the benchmark compares the kernels.
//
//   int8   the byte products of the scan, on codes and rows in the L1 cache
//   fp32   the multiplications and additions, never fused, on registers
//   read   every 64-byte line of a buffer, once
//
// Each returns how much it did, and changes *out by all its results, so that the compiler cannot omit any
// work.
//
// Included inside the namespace and the target region of one instruction set, after scan-inl.h.

int64_t peak_int8(int64_t iterations, int32_t* out) {
  constexpr int64_t kSteps = 32;
  alignas(64) uint8_t codes[kSteps * 4 * kScanGroup];
  int8_t bytes[kSteps * 4];
  for (size_t i = 0; i < sizeof codes; ++i) codes[i] = static_cast<uint8_t>(i);
  for (size_t i = 0; i < sizeof bytes; ++i) bytes[i] = static_cast<int8_t>(i % 64);
  Row rows[Ints::kTokens] = {};
  for (Row& row : rows) row.bytes = bytes;
  alignas(64) int32_t sums[Ints::kTokens * kScanGroup];
  volatile int64_t steps = kSteps;  // unknown to the compiler, as in the scan
  for (int64_t i = 0; i < iterations; ++i) {
    byte_dots<Ints::kTokens>(rows, codes, steps, sums);
    *out ^= sums[i % kScanGroup];
  }
  return iterations * kSteps * Ints::kTokens * 4 * kScanGroup * 2;
}

int64_t peak_fp32(int64_t iterations, int32_t* out) {
  constexpr int kSums = Vec::kSums;
  const float factors[4 * kLanes] = {0.5f, 0.25f, 0.125f, 0.5f};
  Vec sum[kSums];
#pragma GCC unroll 16
  for (int t = 0; t < kSums; ++t) sum[t] = Vec::broadcast(t);
  for (int64_t i = 0; i < iterations; ++i) {
    const Vec factor = Vec::load(factors + i % 4 * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < kSums; ++t) sum[t] = sum[t] * factor + factor;
  }
  float lanes[kLanes];
#pragma GCC unroll 16
  for (int t = 0; t < kSums; ++t) {
    sum[t].store(lanes);
    for (float lane : lanes) *out ^= std::bit_cast<int32_t>(lane);
  }
  return iterations * kSums * kLanes * 2;
}

int64_t peak_read(const int32_t* from, int64_t count, int32_t* out) {
  Vec sum[4] = {Vec::broadcast(0), Vec::broadcast(0), Vec::broadcast(0), Vec::broadcast(0)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[v] = sum[v] + Vec::load(from + i + v * kLanes);
  }
  float lanes[kLanes];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    sum[v].store(lanes);
    for (float lane : lanes) *out ^= std::bit_cast<int32_t>(lane);
  }
  return i * 4;
}
