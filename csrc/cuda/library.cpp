// The library blip_trace/_cuda.so: loaded beside the extension where torch has CUDA, it gives the
// extension's ops their CUDA kernels. The extension itself knows nothing of CUDA.
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "binding.h"

// Of libtorch_cuda. Declared here, for torch's own headers of it are whole only in its CUDA builds.
extern "C" std::int32_t aoti_torch_get_current_cuda_stream(std::int32_t device_index,
                                                           void** ret_stream);

namespace blip_trace::cuda {

Stream current_stream(const Tensor& x) {
  Stream stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.device().index(), &stream) == 0,
              "torch does not tell its CUDA stream.");
  return stream;
}

Tensor wide_product(const Tensor& x, const Tensor& weight) {
  return x.scalar_type() == at::kFloat ? at::mm(x, weight.t())
                                       : at::mm(x, weight.t(), at::kFloat);
}

}  // namespace blip_trace::cuda

TORCH_LIBRARY_IMPL(blip_trace, CUDA, m) {
  m.impl("linear", blip_trace::cuda::linear);
  m.impl("linear_gelu", blip_trace::cuda::linear_gelu);
  m.impl("linear_add_norm", blip_trace::cuda::linear_add_norm);
  m.impl("self_attention", blip_trace::cuda::self_attention);
  m.impl("cross_attention", blip_trace::cuda::cross_attention);
  m.impl("token_logits", blip_trace::cuda::token_logits);
}
