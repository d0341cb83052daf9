// From tensors on a GPU to launches: its current stream, and memory from the framework's allocator, which may
// be freed on the host once a kernel was launched: the allocator keeps the order of the stream.

#pragma once

#include <cstdint>
#include <utility>

#include "arguments.h"
#include "cuda/launch.h"
#include "cuda/select.h"
#include "registration.h"

#include <torch/csrc/stable/accelerator.h>

#ifndef CU_FAST_EMULATED
// A torch without CUDA lacks it; nobody calls it there.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace cu_fast {

// While it lives, launches go to the device of a tensor.
class OnDevice {
 public:
#ifdef CU_FAST_EMULATED
  explicit OnDevice(const Tensor&) {}
  Stream stream() const { return {}; }
#else
  explicit OnDevice(const Tensor& like)
      : device_(static_cast<int32_t>(like.get_device_index())), guard_(device_) {}

  Stream stream() const {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream != nullptr &&
              aoti_torch_get_current_cuda_stream(device_, &stream) == 0,
          "this torch has no CUDA stream");
    return static_cast<Stream>(stream);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// The others must lie where the first does.
inline void check_device(const Tensor& first,
                         std::initializer_list<std::pair<const char*, OptionalTensor>> others) {
  for (const auto& [name, t] : others) {
    check(!t || (t->is_cpu() == first.is_cpu() && t->get_device_index() == first.get_device_index()), name,
          " must be on the same device as the other arguments");
  }
}

// Uninitialised, beside another.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                  dtype);
}

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::f32 ? 4 : 2;
}

// A selection's plan and memory. Results (scores, ids, hits) are for the caller to set; rides_along: hits are
// wanted.
class SelectMemory {
 public:
  SelectMemory(const Tensor& like, const ScoreParams& score, const float* inv_norm, const float* bias,
               const ScanPlane& plane, const Mask& mask, int64_t k, bool rides_along) {
    check_selection(k, score.C);
    check(reinterpret_cast<uintptr_t>(plane.plane) % 16 == 0,
          "scan_plane must start at a multiple of 16 bytes");
    job.p.score = score;
    job.p.inv_norm = inv_norm;
    job.p.bias = bias;
    job.p.scan = plane;
    job.p.mask = mask;
    job.p.k = k;
    job.plan = plan_select(score.T, score.C, score.E, k, bytes_of(score.codes.dtype), plane.plane != nullptr,
                           multiprocessors());
    uint64_t wanted = 0;
    job.p.deleted = rides_along ? &wanted : nullptr;
    Arena count(nullptr);
    SelectJob sized = job;
    take_memory(sized, count);
    memory_ = new_tensor(like, {count.used()}, ScalarType::Byte);
    Arena arena(memory_.mutable_data_ptr());
    take_memory(job, arena);
  }

  SelectJob job = {};

 private:
  Tensor memory_;
};

}  // namespace cu_fast
