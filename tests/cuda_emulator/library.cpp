// The CUDA bindings and kernels on CPU tensors, as torch.ops.blip_trace_emulated.*.
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "../../csrc/cuda/binding.h"

namespace blip_trace::cuda {

Stream current_stream(const Tensor&) { return nullptr; }

Tensor wide_product(const Tensor& x, const Tensor& weight) {
  return at::linear(x.to(at::kFloat), weight.to(at::kFloat));
}

}  // namespace blip_trace::cuda

TORCH_LIBRARY(blip_trace_emulated, m) {
  m.def("linear", blip_trace::cuda::linear);
  m.def("linear_gelu", blip_trace::cuda::linear_gelu);
  m.def("linear_add_norm", blip_trace::cuda::linear_add_norm);
  m.def("self_attention", blip_trace::cuda::self_attention);
  m.def("cross_attention", blip_trace::cuda::cross_attention);
  m.def("token_logits", blip_trace::cuda::token_logits);
}
