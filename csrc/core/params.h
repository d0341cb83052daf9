// What a kernel is given: plain structs, a shape on every pointer. No torch: the host files translate.
//
// Letters: T tokens, D model width, E code width, C codes, k codes kept a token, U masks, W = ceil(C / 32).

#pragma once

#include <cstdint>

#include "core/mask.h"
#include "core/portable.h"
#include "core/scan.h"

namespace cu_fast {

enum class Dtype { f32, bf16, f16 };

// Rows of any stride (zero too: an expanded tensor), each row contiguous. Element (i, j) is i * stride + j
// elements after data; 64-bit, because C * E passes 2^31.
struct Matrix {
  const void* data;
  int64_t stride;
  Dtype dtype;

  CU_FAST_BOTH Matrix from_row(int64_t row) const {
    const int64_t bytes = dtype == Dtype::f32 ? 4 : 2;
    return {static_cast<const char*>(data) + row * stride * bytes, stride, dtype};
  }
};

// The scores of T rows against C codes, before their epilogue: canonical dot products of z - pre and a code.
struct ScoreParams {
  Matrix z;          // [T, E]
  Matrix codes;      // [C, E]
  const float* pre;  // [E], subtracted from every row of z and rounded to fp32; null: nothing is
  int64_t T, C, E;
};

// Tokens [t_begin, t_end), or those that a list has at these places, against codes [c_begin, c_end): what one
// thread works on at a time.
struct Block {
  int64_t t_begin, t_end;
  int64_t c_begin, c_end;
  int64_t part;                   // which part of the codes
  const int64_t* list = nullptr;  // null: the tokens themselves

  int64_t tokens() const { return t_end - t_begin; }
  int64_t token(int64_t i) const { return list == nullptr ? t_begin + i : list[t_begin + i]; }
};

struct SelectParams {
  ScoreParams score;
  const float* inv_norm;  // [C], multiplies the dot product; null: nothing does
  const float* bias;      // [C], added after that; null: nothing is
  ScanPlane scan;         // of codes and inv_norm; plane null: every code is scored canonically
  float largest_bias;     // of the bias's magnitudes; 0 without one
  Mask mask;              // [T] rows, C bits: deleted codes cannot be selected
  int64_t k;
  // Heaps of keys (core/order.h), filled by the scan, read by select_finish. A part keeps `capacity` codes,
  // the smaller of k and the part's codes.
  int64_t parts, capacity;
  uint64_t* kept;     // [T, parts, capacity], codes that may be selected
  uint64_t* deleted;  // [T, parts, capacity], the best deleted codes; null: nobody asks for hits
  // Results, best code first.
  bool relu;      // scores below zero come out as zero; the order is that of the raw scores
  float* scores;  // [T, k], 0 beyond the survivors, NaN for a row with NaN or Inf
  int32_t* ids;   // [T, k], -1 there
  int32_t* hits;  // [T], deleted codes that would have been selected without the mask; null: not wanted
};

struct EncodeParams {
  ScoreParams score;  // z is x [T, D], codes is W_enc [E, D]: C is the operator's E, and E its D
  const float* bias;  // [C], b_enc; null: none
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

}  // namespace cu_fast
