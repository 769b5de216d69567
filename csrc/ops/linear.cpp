// linear: x [rows, K] times weight [M, K] transposed, plus bias [M].
#include "gemm.h"

namespace blip_trace::ops {
namespace {

Tensor checked_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_layer("linear", "x", x, weight, bias);
  return linear(x.contiguous(), weight.contiguous(), contiguous(bias));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_trace, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(blip_trace, CPU, m) { m.impl("linear", checked_linear); }

}  // namespace blip_trace::ops
