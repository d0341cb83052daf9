// The kernels that exist once per instruction set. Scratch is 64-byte aligned; its size is scratch_floats()
// of cpu/grid.h, for the scan also ScanScratch of cpu/scan.h, and LatentScratch of cpu/delete_latents.h.

#pragma once

#include "core/params.h"
#include "cpu/delete_latents.h"

#define CU_FAST_FOR_EACH_LEVEL(...)  \
  namespace scalar {                 \
  __VA_ARGS__                        \
  }                                  \
  namespace avx2 {                   \
  __VA_ARGS__                        \
  }                                  \
  namespace avx512 {                 \
  __VA_ARGS__                        \
  }                                  \
  namespace amx { /* some of them */ \
  __VA_ARGS__                        \
  }                                  \
  namespace neon {                   \
  __VA_ARGS__                        \
  }

namespace cu_fast {

struct PackParams {
  Matrix codes;  // [C, E]
  int64_t C, E;
  int8_t* digits;         // [C, 3, digit_width(E)]
  float *step, *squares;  // [C]
};

CU_FAST_FOR_EACH_LEVEL(
    // Fills the heaps p.kept and p.deleted of a block's tokens and part.
    void select_exact(const SelectParams& p, const Block& block, float* scratch);
    // The same by the certified scan. Its scratch is followed by that of select_exact.
    void select_scan(const SelectParams& p, const Block& block, float* scratch);
    // Writes p.out for a block's tokens and codes.
    void sae_encode(const EncodeParams& p, const Block& block, float* scratch);
    // Packs rows [c_begin, c_end). Scratch: a row of digit_width(E) floats.
    void pack_digits(const PackParams& p, int64_t c_begin, int64_t c_end, float* row);
    // Writes y for tokens [t_begin, t_end). Scratch: p.k slots.
    void masked_decode(const DecodeParams& p, int64_t t_begin, int64_t t_end, DecodeSlot* scratch);
    // The given steps of a block's tokens, which have one mask; its codes are places in the mask's list.
    void delete_latents(const DeleteLatentsParams& p, const Block& block, LatentStep step, float* scratch,
                        const LatentScores& scores);
    // Return the operations or bytes done (peak-inl.h).
    int64_t peak_int8(int64_t iterations, int32_t* out); int64_t peak_fp32(int64_t iterations, int32_t* out);
    int64_t peak_read(const int32_t* from, int64_t count, int32_t* out);)

}  // namespace cu_fast
