// Parameters of the kernels: plain structs, with the shape beside every pointer. No torch: host files fill
// them.
//
// Letters: T tokens, D model width, E code width, C codes, k codes kept per token, U masks in the table,
// W = ceil(C / 32) words per mask.

#pragma once

#include <cstdint>

#include "core/fixed.h"
#include "core/mask.h"
#include "core/portable.h"
#include "core/scan.h"

namespace cu_fast {

enum class Dtype { f32, bf16, f16 };

// A matrix with contiguous rows. Element (i, j) is i * stride + j elements after data. The stride may be zero
// (an expanded tensor). It is 64-bit, because C * E exceeds 2^31.
struct Matrix {
  const void* data;
  int64_t stride;
  Dtype dtype;

  CU_FAST_BOTH Matrix from_row(int64_t row) const {
    const int64_t bytes = dtype == Dtype::f32 ? 4 : 2;
    return {static_cast<const char*>(data) + row * stride * bytes, stride, dtype};
  }
};

// Scores of T rows and C codes (core/fixed.h), of z_t - pre.
struct ScoreParams {
  Matrix z;              // [T, E]
  const int8_t* digits;  // [C, 3, digit_width(E)]
  const float* factor;   // [C]
  const float* bias;     // [C]; null: zero
  const float* pre;      // [E], subtracted from every row of z, rounded to fp32; null: zero
  int64_t T, C, E;

  CU_FAST_BOTH const int8_t* code(int64_t j) const { return digits + j * kDigits * digit_width(E); }
};

// What one thread works on at a time: tokens [t_begin, t_end), or those that entries [t_begin, t_end) of a
// list name, against codes [c_begin, c_end).
struct Block {
  int64_t t_begin, t_end;
  int64_t c_begin, c_end;
  int64_t part;                   // index of [c_begin, c_end) among the parts of the codes
  const int64_t* list = nullptr;  // null: tokens [t_begin, t_end)

  int64_t tokens() const { return t_end - t_begin; }
  int64_t token(int64_t i) const { return list == nullptr ? t_begin + i : list[t_begin + i]; }
};

struct SelectParams {
  ScoreParams score;
  ScanPlane scan;      // packed from digits and factor; plane null: every code is scored
  float largest_bias;  // max |bias_j|; 0 without a bias
  Mask mask;           // [T] rows, C bits: a deleted code cannot be selected
  int64_t k;
  // Lists of keys (core/order.h), one per token and part of the codes, of `capacity` keys each. On a CPU:
  // heaps, [T, parts, capacity]. On a GPU: sorted, [T, capacity, parts] (cuda/select.h).
  int64_t parts, capacity;
  uint64_t* kept;     // the best codes that are not deleted
  uint64_t* deleted;  // the best deleted codes; null: hits are not counted
  // Results, best code first.
  bool relu;      // scores below zero are written as zero; selection uses the raw scores
  float* scores;  // [T, k]; 0 where fewer than k codes are left, NaN for a row with NaN or Inf
  int32_t* ids;   // [T, k]; -1 in those places
  int32_t* hits;  // [T], deleted codes that would be selected without the mask; null: not counted
};

struct EncodeParams {
  ScoreParams score;  // z is x [T, D], codes are W_enc's rows [E, D]: C here is the operator's E, and E its D
  bool relu;
  float* out;  // [T, C]
};

// A code that takes part in a token's sum.
struct DecodeSlot {
  int32_t id;
  float weight;
};

struct DecodeParams {
  const int32_t* ids;    // [T, k], -1: no code
  const float* weights;  // [T, k]; null: all 1
  Matrix table;          // [C, D]
  const float* bias;     // [D]; null: none
  Matrix residual;       // [T, D]; data null: none
  Mask mask;             // [T] rows, C bits: a deleted code is skipped
  bool mean;             // divide the sum by k
  int64_t T, C, D, k;
  void* y;  // [T, D], table's dtype
};

// The most latents that one mask changes: MAX_LATENTS of kernels/reference/latents.py.
inline constexpr int64_t kMaxMaskLatents = 8192;
// Added to a standard deviation: LAYER_NORM_EPS of kernels/reference/scales.py.
inline constexpr float kLayerNormEps = 1e-5f;

// The factors of a token: before it is encoded, and of its decoded latents (kernels/reference/scales.py).
enum class TokenScale { none, layer_norm, constant_norm };

// R latents; at most M of them in a mask.
struct DeleteLatentsParams {
  Matrix x;                   // [T, Din]
  Matrix residual;            // [T, Dout], x itself if the operator was given none
  const int8_t* digits;       // [R, 3, digit_width(Din)], of the encoder's rows
  const float* factor;        // [R]
  Matrix dec;                 // fp32 [R, Dout]
  const float *bias, *theta;  // [R]
  TokenScale scale;
  float norm;  // of TokenScale::constant_norm
  const int32_t*
      mask_latents;  // [U, M], rows of enc, ascending; -1 ends a list; R and above: its tokens are NaN
  const float* mask_change;  // [U, M, 3], gain, clamp and idle
  const int32_t* mask_row;  // [T], -1: nothing deleted. On a GPU not checked: beyond the table is a NaN token
  const float* floor_scores;  // [T], the score of the last latent that a token keeps; null: there is no floor
  const int32_t* floor_ids;   // [T], its row of enc; null where floor_scores is
  int64_t T, Din, Dout, R, U, M;
  void* y;        // [T, Dout], residual's dtype
  int32_t* hits;  // [T]
  float* dose;    // [T]
};

}  // namespace cu_fast
