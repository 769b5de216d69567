// linear_add_norm: the end of a sublayer. Projection, residual stream and LayerNorm; the rows that
// go on are gathered on the way, which is how runs fork and how states are restored.
#include <tuple>

#include "gemm.h"

namespace blip_trace::ops {
namespace {

std::tuple<Tensor, Tensor> linear_add_norm(const Tensor& x_in, const Tensor& weight_in,
                                           const OptionalTensor& bias_in, const Tensor& residual_in,
                                           const OptionalTensor& residual_rows,
                                           const OptionalTensor& update_rows,
                                           const Tensor& norm_weight_in, const Tensor& norm_bias_in,
                                           double eps, bool return_sum) {
  constexpr const char* op = "linear_add_norm";
  const at::AutoDispatchBelowADInplaceOrView guard;
  const std::int64_t rows = check_add_norm(x_in, weight_in, bias_in, residual_in, residual_rows,
                                           update_rows, norm_weight_in, norm_bias_in);
  if (residual_rows) check_rows(op, "residual_rows", *residual_rows, residual_in.size(0));
  if (update_rows) check_rows(op, "update_rows", *update_rows, x_in.size(0));
  const std::int64_t cols = weight_in.size(0);

  const Tensor x = x_in.contiguous(), residual = residual_in.contiguous();
  const Tensor norm_weight = norm_weight_in.contiguous(), norm_bias = norm_bias_in.contiguous();
  OptionalTensor bias = contiguous(bias_in);
  const Tensor y = product(x, weight_in.contiguous(), bias);
  Tensor normed = at::empty({rows, cols}, x.options());
  Tensor sum = return_sum ? at::empty({rows, cols}, x.options()) : at::empty({0}, x.options());
  with_types(y, normed, [&](auto in, auto result) {
    using In = decltype(in);
    using Out = decltype(result);
    const cpu::AddNorm<In, Out> args{const_data<In>(y),
                                     const_data<Out>(bias),
                                     const_data<Out>(residual),
                                     const_data<std::int32_t>(residual_rows),
                                     const_data<std::int32_t>(update_rows),
                                     const_data<Out>(norm_weight),
                                     const_data<Out>(norm_bias),
                                     static_cast<float>(eps),
                                     cols,
                                     data<Out>(normed),
                                     return_sum ? data<Out>(sum) : nullptr};
    for_rows(rows, cols, 8, [&](std::int64_t begin, std::int64_t end) {
      cpu::kernels().rows<In, Out>().add_norm(args, begin, end, scratch(cols));
    });
  });
  return {normed, sum};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_trace, m) {
  m.def(
      "linear_add_norm(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? "
      "residual_rows, "
      "Tensor? update_rows, Tensor norm_weight, Tensor norm_bias, float eps, bool return_sum) "
      "-> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(blip_trace, CPU, m) { m.impl("linear_add_norm", linear_add_norm); }

}  // namespace blip_trace::ops
