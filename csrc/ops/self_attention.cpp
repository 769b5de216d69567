// self_attention: multi-head attention inside each run of a packed batch. A run may begin with rows
// that another one holds, as in a causal stack where both are the same up to some token.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"

namespace blip_trace::ops {
namespace {

void check_prefixes(const Tensor& prefixes, std::int64_t runs, std::int64_t rows) {
  const auto* values = const_data<std::int32_t>(prefixes);
  for (std::int64_t run = 0; run < runs; ++run) {
    const std::int64_t first = values[2 * run], count = values[2 * run + 1];
    TORCH_CHECK_INDEX(first >= 0 && count >= 0 && first + count <= rows,
                      "blip_trace::self_attention: the prefix of run ", run, ", ", count,
                      " rows from ", first, " on, is not within ", rows, " rows.");
  }
}

Tensor self_attention(const Tensor& qkv_in, const Tensor& starts,
                      const OptionalTensor& prefixes, std::int64_t heads, bool causal) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const std::int64_t runs = check_self_attention(qkv_in, starts, prefixes, heads);
  check_starts("self_attention", "starts", starts, qkv_in.size(0));
  if (prefixes) check_prefixes(*prefixes, runs, qkv_in.size(0));
  const Tensor qkv = qkv_in.contiguous();
  const std::int64_t channels = qkv.size(1) / 3, size = channels / heads, stride = 3 * channels;
  Tensor out = at::empty({qkv.size(0), channels}, qkv.options());
  const auto* marks = const_data<std::int32_t>(starts);
  const auto* before = prefixes ? const_data<std::int32_t>(*prefixes) : nullptr;
  std::int64_t gathered = 0;
  for (std::int64_t run = 0; before != nullptr && run < runs; ++run) {
    if (before[2 * run + 1] > 0) gathered += before[2 * run + 1] + marks[run + 1] - marks[run];
  }
  // The rows of runs with a prefix, side by side: queries come along, so that one stride serves all.
  const Tensor whole = at::empty({gathered, stride}, qkv.options());
  with_type(qkv, [&](auto element) {
    using T = decltype(element);
    const T* rows = const_data<T>(qkv);
    T* next = data<T>(whole);
    std::vector<AttentionJob<T, T>> jobs;
    jobs.reserve(static_cast<std::size_t>(runs * heads));
    for (std::int64_t run = 0; run < runs; ++run) {
      const std::int64_t first = marks[run], length = marks[run + 1] - first;
      if (length == 0) continue;
      const std::int64_t shared = before == nullptr ? 0 : before[2 * run + 1];
      if (shared == 0 && by_torch(qkv, length, length)) {
        const Tensor own = qkv.narrow(0, first, length);
        attend_by_torch(own.narrow(1, 0, channels), own.narrow(1, channels, channels),
                        own.narrow(1, 2 * channels, channels), heads, causal,
                        out.narrow(0, first, length));
        continue;
      }
      const T* seen = rows + first * stride;
      if (shared > 0) {
        const T* prefix = rows + before[2 * run] * stride;
        std::memcpy(next, prefix, sizeof(T) * static_cast<std::size_t>(shared * stride));
        std::memcpy(next + shared * stride, seen,
                    sizeof(T) * static_cast<std::size_t>(length * stride));
        seen = next;
        next += (shared + length) * stride;
      }
      for (std::int64_t h = 0; h < heads; ++h) {
        const T* query = rows + first * stride + h * size;
        const T* key = seen + channels + h * size;
        jobs.push_back({query, length, key, key + channels, shared + length,
                        data<T>(out) + first * channels + h * size});
      }
    }
    attend(jobs, {size, stride, stride, stride, channels,
                  1.0f / std::sqrt(static_cast<float>(size)), causal});
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_trace, m) {
  m.def(
      "self_attention(Tensor qkv, Tensor starts, Tensor? prefixes, int heads, bool causal) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(blip_trace, CPU, m) { m.impl("self_attention", self_attention); }

}  // namespace blip_trace::ops
