// The devices of this build, and the steps that several operators share. Each operator is one function
// template over a Device: it checks the arguments, takes the memory of the results, and leaves the rest to
// the device.

#pragma once

#include <tuple>
#include <utility>

#ifndef CU_FAST_EMULATED
#include "host/cpu.h"
#endif
#if defined(CU_FAST_CUDA) || defined(CU_FAST_EMULATED)
#include "host/cuda.h"
#endif

namespace cu_fast {

// z [T, E].
template <class Device>
Tensor encode(const Device& device, const ScoreArguments& in, bool relu) {
  Tensor z = device.empty({in.score.T, in.score.C}, ScalarType::Float);
  device.encode({in.score, relu, z.mutable_data_ptr<float>()});
  return z;
}

// scores and ids, [T, k]; with counts_hits deleted codes are counted in p.hits.
template <class Device>
std::tuple<Tensor, Tensor> select(const Device& device, SelectParams p, bool counts_hits) {
  Tensor scores = device.empty({p.score.T, p.k}, ScalarType::Float);
  Tensor ids = device.empty({p.score.T, p.k}, ScalarType::Int);
  p.scores = scores.mutable_data_ptr<float>();
  p.ids = ids.mutable_data_ptr<int32_t>();
  device.select(p, counts_hits);
  return {std::move(scores), std::move(ids)};
}

}  // namespace cu_fast
