// Pages of 2 MiB for what is written once and read by every later call: the digits and the plane of a codebook. A page
// of 4 KiB holds one or two codes, so that nearly each code that is scored would miss the TLB.

#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arguments.h"

namespace cu_fast {

inline constexpr uintptr_t kHugePage = 2 * 1024 * 1024;

// A new tensor of bytes, before it is written: a page that has been touched keeps its size. Only whole huge pages inside
// it are asked for, so that it takes no more memory. A system that has none to give changes nothing.
inline Tensor on_huge_pages(Tensor bytes) {
#if defined(__linux__)
  const auto begin = reinterpret_cast<uintptr_t>(bytes.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes.numel()) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return bytes;
}

}  // namespace cu_fast
