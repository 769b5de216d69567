// linear: x [rows, K] times weight [M, K] transposed, plus bias [M].
#include <ATen/ops/addmm.h>

#include "gemm.h"

namespace blip_trace::ops {
namespace {

Tensor linear(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_matrix("linear", "x", x_in);
  check_like("linear", "weight", weight_in, x_in, {weight_in.size(0), x_in.size(1)});
  if (bias_in) check_like("linear", "bias", *bias_in, x_in, {weight_in.size(0)});
  const Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  const OptionalTensor bias = contiguous(bias_in);
  if (way_of(x) == Way::torch) return bias ? at::addmm(*bias, x, weight.t()) : product(x, weight);
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  linear_into(x, weight, bias, false, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_trace, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(blip_trace, CPU, m) { m.impl("linear", linear); }

}  // namespace blip_trace::ops
