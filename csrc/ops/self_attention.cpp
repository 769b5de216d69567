// self_attention: multi-head attention inside each run of a packed batch.
#include <ATen/ops/empty_like.h>

#include <cmath>

#include "attention.h"

namespace blip_trace::ops {
namespace {

Tensor self_attention(const Tensor& qkv_in, const Tensor& starts, std::int64_t heads, bool causal) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_matrix("self_attention", "qkv", qkv_in);
  TORCH_CHECK_VALUE(heads > 0 && qkv_in.size(1) % (3 * heads) == 0,
                    "blip_trace::self_attention: qkv of width ", qkv_in.size(1),
                    " does not hold queries, keys and values of ", heads, " heads.");
  const std::int64_t runs = check_starts("self_attention", "starts", starts, qkv_in.size(0));
  const Tensor qkv = qkv_in.contiguous();
  const std::int64_t channels = qkv.size(1) / 3, size = channels / heads;
  Tensor out = at::empty({qkv.size(0), channels}, qkv.options());
  const auto* marks = const_data<std::int32_t>(starts);
  with_type(qkv, [&](auto element) {
    using T = decltype(element);
    std::vector<AttentionJob<T, T>> jobs;
    jobs.reserve(static_cast<std::size_t>(runs * heads));
    for (std::int64_t run = 0; run < runs; ++run) {
      const std::int64_t first = marks[run], length = marks[run + 1] - first;
      if (length == 0) continue;
      for (std::int64_t h = 0; h < heads; ++h) {
        const T* query = const_data<T>(qkv) + first * 3 * channels + h * size;
        jobs.push_back({query, length, query + channels, query + 2 * channels, length,
                        data<T>(out) + first * channels + h * size});
      }
    }
    attend(jobs, {size, 3 * channels, 3 * channels, 3 * channels, channels,
                  1.0f / std::sqrt(static_cast<float>(size)), causal});
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_trace, m) {
  m.def("self_attention(Tensor qkv, Tensor starts, int heads, bool causal) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(blip_trace, CPU, m) { m.impl("self_attention", self_attention); }

}  // namespace blip_trace::ops
