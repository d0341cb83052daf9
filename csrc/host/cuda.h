// A GPU, as a Device of the operators (host/devices.h): its current stream, and memory from the framework's
// allocator, which may be freed on the host once a kernel was launched: the allocator keeps the order of the
// stream.

#pragma once

#include <cstdint>
#include <initializer_list>

#include "arguments.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/select.h"

#include <torch/csrc/stable/accelerator.h>

#ifndef CU_FAST_EMULATED
// A torch without CUDA lacks it, and does not call it.
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

// The current device, for plans.
inline Card this_card() {
#ifdef CU_FAST_EMULATED
  return {multiprocessors(), 9, 0};
#else
  return {multiprocessors(), device_attribute(cudaDevAttrComputeCapabilityMajor),
          device_attribute(cudaDevAttrComputeCapabilityMinor)};
#endif
}

// Uninitialised, beside another.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                  dtype);
}

// A selection's plan and memory.
class SelectMemory {
 public:
  // counts_hits: deleted codes are kept too, for hits.
  SelectMemory(const Tensor& like, const SelectParams& p, bool counts_hits) {
    check(reinterpret_cast<uintptr_t>(p.scan.plane) % 16 == 0,
          "scan_plane must start at a multiple of 16 bytes");
    job.p = p;
    job.plan = plan_select(p.score.T, p.score.C, p.score.E, p.k, p.scan.plane != nullptr, this_card());
    uint64_t wanted = 0;
    job.p.deleted = counts_hits ? &wanted : nullptr;
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

class Cuda {
 public:
  static constexpr Values kValues = Values::on_device;

  // The others, each behind its name, must lie where the first argument does.
  template <class... Others>
  explicit Cuda(const Tensor& first, const Others&... others)
      : first_((check_device(first, others...), first)), device_(first) {}

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return new_tensor(first_, sizes, dtype);
  }

  void encode(const EncodeParams& p) const {
    const int64_t rows = rows_at_once(p.score.T, p.score.E);
    Arena count(nullptr);
    take_rows(rows, p.score.E, count);
    const Tensor memory = new_tensor(first_, {count.used()}, ScalarType::Byte);
    Arena arena(memory.mutable_data_ptr());
    launch_sae_encode(p, take_rows(rows, p.score.E, arena), device_.stream());
  }

  void select(const SelectParams& p, bool counts_hits) const {
    launch_codebook_quantize(SelectMemory(first_, p, counts_hits).job, device_.stream());
  }

  void decode(const DecodeParams& p) const { launch_masked_decode(p, device_.stream()); }

  void delete_latents(const DeleteLatentsParams& p) const { launch_delete_latents(p, device_.stream()); }

  // With every code scored, three launches: the kernel that ends the selection decodes.
  void bottleneck(const SelectParams& p, bool counts_hits, bool score_weights, const DecodeParams& decode,
                  int64_t* receipt) const {
    const SelectMemory memory(first_, p, counts_hits);
    if (decode.T == 0 || decode.D == 0) return;
    launch_codebook_bottleneck({memory.job, decode.mask, score_weights, decode.mean, decode.table,
                                decode.bias, decode.D, decode.y, receipt},
                               device_.stream());
  }

 private:
  static void check_device(const Tensor&) {}

  template <class... Others>
  static void check_device(const Tensor& first, const char* name, const OptionalTensor& t,
                           const Others&... others) {
    check(!t || (t->is_cpu() == first.is_cpu() && t->get_device_index() == first.get_device_index()), name,
          " must be on the same device as the other arguments");
    check_device(first, others...);
  }

  const Tensor& first_;
  const OnDevice device_;
};

}  // namespace cu_fast
