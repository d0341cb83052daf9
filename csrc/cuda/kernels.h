// What the host files call: each starts the kernels of one operator and waits for nothing.

#pragma once

#include "core/params.h"
#include "cuda/launch.h"
#include "cuda/select.h"

namespace cu_fast {

// Writes p.out.
void launch_sae_encode(const EncodeParams& p, Stream stream);

// Fills job.p.kept (and deleted) for one chunk: scores every code, or scans.
void launch_select_parts(const SelectJob& job, Stream stream);
// The kernels of the scan, up to the parts of the rows that it can do; and two of them alone.
void launch_scan(const SelectJob& job, Stream stream);
void launch_scan_rows(const SelectJob& job, Stream stream);
void launch_scan_codes(const SelectJob& job, bool sample, Stream stream);
// What launch_scan_codes calls for more than 64 tokens, where it can run: compute capability 9.0, and code
// for 90a.
void launch_scan_codes_sm90(const SelectJob& job, bool sample, Stream stream);
// All chunks, and the results in p.scores, p.ids and p.hits.
void launch_codebook_quantize(const SelectJob& job, Stream stream);

void launch_masked_decode(const DecodeParams& p, Stream stream);

// What follows the selection in a bottleneck: merges the parts of a chunk, weighs, and decodes.
struct BottleneckParams {
  SelectJob job;
  Mask ablated;        // deleted codes among the selected add nothing; table null: none
  bool score_weights;  // relu(score) a code, or 1
  bool mean;
  Matrix table;       // [C, D]
  const float* bias;  // [D]; null: none
  int64_t D;
  void* y;           // [T, D], table's dtype
  int64_t* receipt;  // [2]: tokens, and codes that the mask took, are added; null: not wanted
};

void launch_codebook_bottleneck(const BottleneckParams& p, Stream stream);

// Whether the library holds machine code for an architecture, like 90a (built.cpp).
bool built_for(const char* arch);

}  // namespace cu_fast
