// What the host files call. Each function launches the kernels of one operator and does not wait for them.

#pragma once

#include "core/params.h"
#include "cuda/launch.h"
#include "cuda/select.h"

namespace cu_fast {

// Fills rows for all tokens of p.z.
void launch_fix_rows(const ScoreParams& p, const FixedRows& rows, Stream stream);

// Writes p.out. rows: memory for rows_at_once(T, E) of them.
void launch_sae_encode(const EncodeParams& p, const FixedRows& rows, Stream stream);

// Fills job.p.kept and job.p.deleted for one chunk: scores every code, or scans.
void launch_select_parts(const SelectJob& job, Stream stream);
// All kernels of the scan. They fill the lists of the rows that the scan can do. Below, two of them alone.
void launch_scan(const SelectJob& job, Stream stream);
void launch_scan_rows(const SelectJob& job, Stream stream);
void launch_scan_codes(const SelectJob& job, bool sample, Stream stream);
// Called by launch_scan_codes for more than 32 tokens, if has_hopper().
void launch_scan_codes_sm90(const SelectJob& job, bool sample, Stream stream);
// Runs all chunks, and writes p.scores, p.ids and p.hits.
void launch_codebook_quantize(const SelectJob& job, Stream stream);

void launch_masked_decode(const DecodeParams& p, Stream stream);

// Writes p.y, p.hits and p.dose.
void launch_delete_latents(const DeleteLatentsParams& p, Stream stream);

// A bottleneck: a selection, then in one kernel the merge of its parts, the weights and the decoder.
struct BottleneckParams {
  SelectJob job;
  Mask ablated;        // a selected code that it deletes adds nothing; table null: none
  bool score_weights;  // true: a code's weight is relu(score); false: 1
  bool mean;           // divide the sum by k
  Matrix table;        // [C, D]
  const float* bias;   // [D]; null: none
  int64_t D;
  void* y;           // [T, D], table's dtype
  int64_t* receipt;  // [2], += tokens, and codes that masks took away; null: not counted
};

void launch_codebook_bottleneck(const BottleneckParams& p, Stream stream);

// Whether the library holds machine code for an architecture, like 90a (built.cpp).
bool built_for(const char* arch);
// Whether kernels for 90a can run: on compute capability 9.0, if the library holds them (scan_codes.cu).
// CU_FAST_WGMMA=0 disables them.
bool has_hopper();

}  // namespace cu_fast
