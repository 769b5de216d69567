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
  if (x.scalar_type() == at::kFloat || native_bf16_products()) {
    return bias ? at::addmm(*bias, x, weight.t()) : product(x, weight);
  }
  const Tensor y = product(x, weight);
  Tensor out = at::empty(y.sizes(), x.options());
  const std::int64_t cols = y.size(1);
  for_rows(y.size(0), cols, 2, [&](std::int64_t begin, std::int64_t end) {
    cpu::kernels().rows_f32_bf16.add_bias(const_data<float>(y) + begin * cols, const_data<bf16>(bias),
                                          data<bf16>(out) + begin * cols, end - begin, cols);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_trace, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(blip_trace, CPU, m) { m.impl("linear", linear); }

}  // namespace blip_trace::ops
