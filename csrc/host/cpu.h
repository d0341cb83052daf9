// The CPU, as a Device of the operators (host/devices.h).

#pragma once

#include <cstdint>
#include <initializer_list>

#include "arguments.h"

namespace cu_fast {

class Cpu {
 public:
  static constexpr Values kValues = Values::readable;

  // Nothing to check: the dispatcher calls the CPU's operators only if no argument lies elsewhere.
  template <class... Others>
  explicit Cpu(const Tensor&, const Others&...) {}

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return new_tensor(sizes, dtype);
  }

  // Each in cpu/<op>.cpp: cuts the work into shares of the threads, and runs the kernels of an instruction
  // set.
  void encode(const EncodeParams& p) const;
  void select(SelectParams p, bool counts_hits) const;
  void decode(const DecodeParams& p) const;
  void delete_latents(const DeleteLatentsParams& p) const;
  void bottleneck(SelectParams p, bool counts_hits, bool score_weights, DecodeParams decode,
                  int64_t* receipt) const;
};

}  // namespace cu_fast
