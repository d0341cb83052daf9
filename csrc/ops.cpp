// Every operator of the library: the schemas of cu_fast/kernels/operators.py, and what the library says of
// itself. host/<op>.cpp implements them for every device (pack_scan and peak, which only a CPU has, are in
// cpu/).

#include "registration.h"

// clang-format off
CU_FAST_LIBRARY(CU_FAST_NAMESPACE, m) {
  m.def("codebook_quantize(Tensor z, Tensor digits, Tensor factor, Tensor? bias, int k, Tensor? mask_table, Tensor? mask_row, bool return_hits, Tensor? scan_plane, Tensor? scan_terms, Tensor? scan_mean) -> (Tensor scores, Tensor ids, Tensor hits)");
  m.def("pack_digits(Tensor codes) -> (Tensor digits, Tensor step, Tensor squares)");
  m.def("pack_scan(Tensor digits, Tensor factor, int E) -> (Tensor scan_plane, Tensor scan_terms, Tensor scan_mean)");
  m.def("sae_encode(Tensor x, Tensor W_digits, Tensor W_factor, Tensor? b_enc, Tensor? b_pre, bool relu) -> Tensor z");
  m.def("sae_encode_topk(Tensor x, Tensor W_digits, Tensor W_factor, Tensor? b_enc, Tensor? b_pre, int k, Tensor? mask_table, Tensor? mask_row, bool relu, Tensor? scan_plane, Tensor? scan_terms, Tensor? scan_mean) -> (Tensor scores, Tensor ids)");
  m.def("codebook_bottleneck(Tensor x, Tensor? W_digits, Tensor? W_factor, Tensor? b_enc, Tensor? b_pre, bool relu, Tensor digits, Tensor factor, Tensor? bias, int k, Tensor? mask_table, Tensor? mask_row, bool reselect, Tensor? scan_plane, Tensor? scan_terms, Tensor? scan_mean, Tensor table, Tensor? b_dec, bool score_weights, bool mean, Tensor(a!)? receipt) -> Tensor y");
  m.def("masked_decode(Tensor ids, Tensor? weights, Tensor table, Tensor? bias, Tensor? residual, Tensor? mask_table, Tensor? mask_row, bool mean) -> Tensor y");
  m.def("delete_latents(Tensor x, Tensor? residual, Tensor enc_digits, Tensor enc_factor, Tensor bias, Tensor theta, Tensor dec, int scale, float norm, Tensor mask_latents, Tensor mask_change, Tensor mask_row, Tensor? floor_scores, Tensor? floor_ids) -> (Tensor y, Tensor hits, Tensor dose)");
  m.def("selection_plan(int T, int C, int E, int k, int threads, bool scan) -> str");
  m.def("cuda_selection_plan(int T, int C, int E, int k, bool scan, int multiprocessors, int major, int minor) -> str");
  m.def("simd_level() -> str");
  m.def("cuda_build() -> str");
  m.def("cuda_driver_failure() -> str");
  m.def("peak(str kind, int iterations) -> int");
  m.def("peak_read(Tensor buffer) -> int");
}
// clang-format on
