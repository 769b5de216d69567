// linear_gelu: GELU of a linear layer, bias and activation in one pass over the product.
#include "gemm.h"

namespace blip_trace::ops {
namespace {

Tensor linear_gelu(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_matrix("linear_gelu", "x", x_in);
  check_like("linear_gelu", "weight", weight_in, x_in, {weight_in.size(0), x_in.size(1)});
  check_like("linear_gelu", "bias", bias_in, x_in, {weight_in.size(0)});
  const Tensor x = x_in.contiguous();
  OptionalTensor bias = bias_in.contiguous();
  const Tensor y = product(x, weight_in.contiguous(), bias);
  Tensor out = y.scalar_type() == x.scalar_type() ? y : at::empty(y.sizes(), x.options());
  const std::int64_t cols = y.size(1);
  with_types(y, out, [&](auto in, auto result) {
    using In = decltype(in);
    using Out = decltype(result);
    for_rows(y.size(0), cols, 16, [&](std::int64_t begin, std::int64_t end) {
      cpu::kernels().rows<In, Out>().add_bias_gelu(const_data<In>(y) + begin * cols, const_data<Out>(bias),
                                                   data<Out>(out) + begin * cols, end - begin, cols);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_trace, m) {
  m.def("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(blip_trace, CPU, m) { m.impl("linear_gelu", linear_gelu); }

}  // namespace blip_trace::ops
