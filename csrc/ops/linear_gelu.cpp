// linear_gelu: GELU of a linear layer, bias and activation in one pass over the product.
#include "gemm.h"

namespace blip_trace::ops {
namespace {

Tensor linear_gelu(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_layer("linear_gelu", "x", x_in, weight_in, bias_in);
  const Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  OptionalTensor bias = bias_in.contiguous();
  if (way_of(x) != Way::torch) {
    Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
    linear_into(x, weight, bias, true, out);
    return out;
  }
  Tensor out = product(x, weight, bias);
  const std::int64_t cols = out.size(1);
  with_type(out, [&](auto element) {
    using T = decltype(element);
    for_rows(out.size(0), cols, 16, [&](std::int64_t begin, std::int64_t end) {
      cpu::kernels().gelu<T>().add_bias_gelu(const_data<T>(bias), data<T>(out) + begin * cols,
                                             end - begin, cols);
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_trace, m) {
  m.def("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(blip_trace, CPU, m) { m.impl("linear_gelu", linear_gelu); }

}  // namespace blip_trace::ops
