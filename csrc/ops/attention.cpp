#include "attention.h"

#include <ATen/ops/scaled_dot_product_attention.h>

#include "gemm.h"

namespace blip_trace::ops {
namespace {

// Queries that share a tile of scores: as many as keep it well inside the second-level cache.
std::int64_t query_block(std::int64_t m) {
  constexpr std::int64_t scores = 48 * 640, tile_rows = 6;
  return std::clamp<std::int64_t>(scores / std::max<std::int64_t>(1, m) / tile_rows * tile_rows,
                                  tile_rows, 96);
}

template <class Q, class KV, bool pairs>
struct Runner {
  const cpu::Kernels& kernels;
  const AttentionShape& shape;

  // Words that a row of so many elements takes in panels.
  static std::int64_t words(std::int64_t elements) { return pairs ? (elements + 1) / 2 : elements; }
  std::int64_t keys_size(std::int64_t m) const { return kernels.packed_size(words(shape.size), m); }
  std::int64_t values_size(std::int64_t m) const {
    return kernels.packed_size(words(m), shape.size);
  }

  void pack_keys(const AttentionJob<Q, KV>& job, float* to) const {
    if constexpr (pairs) {
      kernels.pairs.pack_keys(reinterpret_cast<const cpu::Pair*>(job.key), shape.key_stride / 2,
                              shape.size / 2, job.m, to);
    } else {
      kernels.pack<KV>().pack_transposed(job.key, shape.key_stride, shape.size, job.m, to);
    }
  }

  // For products with `rows` rows.
  cpu::Panels pack_values(const AttentionJob<Q, KV>& job, std::int64_t rows, float* to) const {
    if constexpr (pairs) {
      kernels.pairs.pack_values(job.value, shape.value_stride, job.m, shape.size, to);
      return {to, words(job.m), shape.size};
    } else {
      return kernels.panels(job.value, shape.value_stride, job.m, shape.size, rows, to);
    }
  }

  void block(const AttentionJob<Q, KV>& job, std::int64_t first, std::int64_t n, const float* keys,
             const cpu::Panels& values, float* work) const {
    const auto attend = [&] {
      if constexpr (pairs) return kernels.pairs.attend;
      else return kernels.attention<Q>().attend;
    }();
    attend(job.query + first * shape.query_stride, shape.query_stride, n,
           {keys, words(shape.size), job.m}, values, shape.scale,
           shape.causal ? job.m - job.n + first + 1 : job.m,
           job.out + first * shape.out_stride, shape.out_stride, work);
  }

  // Jobs of one block of queries each: packing and attention in one go, in the thread's scratch.
  void short_jobs(const AttentionJob<Q, KV>* jobs, std::int64_t count, std::int64_t work) const {
    at::parallel_for(0, count, grain(work / count), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const auto& job = jobs[i];
        const std::int64_t keys = keys_size(job.m), values = values_size(job.m);
        float* memory = scratch(keys + values +
                                kernels.attention_scratch(job.n, shape.size, job.m, shape.size));
        pack_keys(job, memory);
        const cpu::Panels right = pack_values(job, job.n, memory + keys);
        block(job, 0, job.n, memory, right, memory + keys + values);
      }
    });
  }

  // Long jobs of one shape, such as the heads of one run: keys and values are packed once for all
  // blocks.
  void long_jobs(const AttentionJob<Q, KV>* jobs, std::int64_t count) const {
    const std::int64_t n = jobs->n, m = jobs->m, keys = keys_size(m), values = values_size(m);
    const std::int64_t step = query_block(m), blocks = (n + step - 1) / step;
    const Tensor memory = at::empty({count * (keys + values)}, at::kFloat);
    float* packed = data<float>(memory);
    std::vector<cpu::Panels> right(static_cast<std::size_t>(count));
    at::parallel_for(0, count, grain(m * shape.size * 4),
                     [&](std::int64_t begin, std::int64_t end) {
                       for (std::int64_t i = begin; i < end; ++i) {
                         float* mine = packed + i * (keys + values);
                         pack_keys(jobs[i], mine);
                         right[i] = pack_values(jobs[i], n, mine + keys);
                       }
                     });
    at::parallel_for(0, count * blocks, grain(step * m * shape.size * 4),
                     [&](std::int64_t begin, std::int64_t end) {
                       float* work =
                           scratch(kernels.attention_scratch(step, shape.size, m, shape.size));
                       for (std::int64_t i = begin; i < end; ++i) {
                         const std::int64_t head = i / blocks, first = i % blocks * step;
                         block(jobs[head], first, std::min(step, n - first),
                               packed + head * (keys + values), right[head], work);
                       }
                     });
  }

  void run(const std::vector<AttentionJob<Q, KV>>& jobs) const {
    const auto is_short = [](const auto& job) { return job.n <= query_block(job.m); };
    for (std::size_t first = 0; first < jobs.size();) {
      const auto& head = jobs[first];
      std::size_t last = first;
      if (is_short(head)) {
        std::int64_t work = 0;
        for (; last < jobs.size() && is_short(jobs[last]); ++last)
          work += jobs[last].n * jobs[last].m * shape.size * 4;
        short_jobs(jobs.data() + first, static_cast<std::int64_t>(last - first), work);
      } else {
        while (last < jobs.size() && jobs[last].n == head.n && jobs[last].m == head.m) ++last;
        long_jobs(jobs.data() + first, static_cast<std::int64_t>(last - first));
      }
      first = last;
    }
  }
};

bool pairs_fit(const AttentionShape& shape) {
  const std::int64_t strides = shape.query_stride | shape.key_stride;
  return bfloat16_way() != Way::widened && cpu::kernels().pairs.attend != nullptr &&
         (shape.size | strides) % 2 == 0;
}

}  // namespace

template <class Q, class KV>
void attend(const std::vector<AttentionJob<Q, KV>>& jobs, const AttentionShape& shape) {
  if constexpr (std::is_same_v<Q, bf16> && std::is_same_v<KV, bf16>) {
    if (pairs_fit(shape)) {
      Runner<Q, KV, true>{cpu::kernels(), shape}.run(jobs);
      return;
    }
  }
  Runner<Q, KV, false>{cpu::kernels(), shape}.run(jobs);
}

bool by_torch(const Tensor& query, std::int64_t n, std::int64_t m) {
  constexpr std::int64_t rows_of_tiles = 32;
  return n >= rows_of_tiles && m >= rows_of_tiles && query.scalar_type() == at::kBFloat16 &&
         way_of(query) == Way::torch;
}

void attend_by_torch(const Tensor& query, const Tensor& keys, const Tensor& values,
                     std::int64_t heads, bool causal, Tensor out) {
  const auto by_head = [&](const Tensor& rows) {
    return rows.unflatten(1, {heads, -1}).transpose(0, 1).unsqueeze(0);  // [1, H, rows, d]
  };
  const Tensor context = at::scaled_dot_product_attention(by_head(query), by_head(keys),
                                                          by_head(values), std::nullopt, 0.0, causal);
  by_head(out).copy_(context);
}

template void attend(const std::vector<AttentionJob<float, float>>&, const AttentionShape&);
template void attend(const std::vector<AttentionJob<float, bf16>>&, const AttentionShape&);
template void attend(const std::vector<AttentionJob<bf16, bf16>>&, const AttentionShape&);

}  // namespace blip_trace::ops
