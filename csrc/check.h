// Checks on the host, before a kernel starts: each names the argument, what it must be and what it was.
// cu_fast.ops has checked shapes and types already; these are for direct callers of the operators.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace cu_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool ok, const Parts&... message) {
  if (ok) return;
  std::ostringstream text;
  text << "cu_fast: ";
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// "Float [3, 4]"
inline std::string describe(const Tensor& t) {
  std::ostringstream text;
  text << torch::headeronly::toString(t.scalar_type()) << " [";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << "]";
  return text.str();
}

// `letters` names the sizes: check_shape("z", z, "[T, E]", {T, E}). A size of -1 may be anything.
inline void check_shape(const char* name, const Tensor& t, const char* letters,
                        std::initializer_list<int64_t> sizes) {
  bool ok = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) {
    ok = ok && (size < 0 || t.size(d) == size);
    ++d;
  }
  if (ok) return;  // a stream costs as much as a small kernel's launch: only for a message
  std::ostringstream wanted;
  for (int64_t size : sizes) {
    if (wanted.tellp() > 0) wanted << ", ";
    size < 0 ? wanted << "any" : wanted << size;
  }
  check(false, name, " must have shape ", letters, " = [", wanted.str(), "], got ", describe(t));
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype) return;
  check(false, name, " must be ", torch::headeronly::toString(dtype), ", got ", describe(t));
}

inline void check_float(const char* name, const Tensor& t) {
  const ScalarType s = t.scalar_type();
  if (s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half) return;
  check(false, name, " must be Float, BFloat16 or Half, got ", describe(t));
}

// A copy of an int32 [rows, columns] tensor, every element in [low, high). Elements that become addresses are
// read from it: another thread may write to the tensor after the check.
inline std::vector<int32_t> checked_copy(const char* name, const int32_t* values, int64_t rows,
                                         int64_t columns, int64_t low, int64_t high) {
  std::vector<int32_t> copy(values, values + rows * columns);
  int64_t outside = 0;  // a sum, for vector instructions: they cannot leave a loop early
  for (int32_t value : copy) outside += value < low || value >= high;
  for (int64_t i = 0; outside > 0 && i < rows * columns; ++i) {
    if (copy[i] >= low && copy[i] < high) continue;
    std::ostringstream position;
    position << i / columns;
    if (columns > 1) position << ", " << i % columns;
    check(false, name, "[", position.str(), "] is ", copy[i], ", must be in [", low, ", ", high, ")");
  }
  return copy;
}

}  // namespace cu_fast
