// The decoder: gather and sum; a deleted code adds nothing.
//
//   y[t] = reduce_i(weights[t, i] table[ids[t, i]]) + bias + residual[t]        reduce: sum, or the sum by k
//
// Checked: one device; shapes and dtypes; and, where values can be read, that every id and mask row exists.

#include "host/devices.h"
#include "registration.h"

namespace cu_fast {
namespace {

template <class Device>
Tensor masked_decode(const Tensor& ids, const OptionalTensor& weights, const Tensor& table,
                     const OptionalTensor& bias, const OptionalTensor& residual,
                     const OptionalTensor& mask_table, const OptionalTensor& mask_row, bool mean) {
  const Device device(ids, "weights", weights, "table", table, "bias", bias, "residual", residual,
                      "mask_table", mask_table, "mask_row", mask_row);
  DecodeArguments in =
      decode_arguments(ids, weights, table, bias, residual, {mask_table, mask_row}, mean, Device::kValues);
  Tensor y = device.empty({in.p.T, in.p.D}, table.scalar_type());
  in.p.y = y.mutable_data_ptr();
  device.decode(in.p);
  return y;
}

}  // namespace
}  // namespace cu_fast

CU_FAST_OPERATORS(Device, m) {
  m.impl("masked_decode", TORCH_BOX(&cu_fast::masked_decode<Device>));
}
