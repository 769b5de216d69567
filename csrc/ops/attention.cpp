#include "attention.h"

namespace blip_trace::ops {
namespace {

// Queries that share a tile of scores: as many as keep it well inside the second-level cache.
std::int64_t query_block(std::int64_t m) {
  constexpr std::int64_t scores = 48 * 640, tile_rows = 6;
  return std::clamp<std::int64_t>(scores / std::max<std::int64_t>(1, m) / tile_rows * tile_rows,
                                  tile_rows, 96);
}

template <class Q, class KV>
struct Runner {
  const cpu::Kernels& kernels;
  const AttentionShape& shape;

  std::int64_t keys_size(std::int64_t m) const { return kernels.packed_size(shape.size, m); }
  std::int64_t values_size(std::int64_t m) const { return kernels.packed_size(m, shape.size); }

  void pack(const AttentionJob<Q, KV>& job, float* keys, float* values) const {
    const auto& pack = kernels.pack<KV>();
    pack.pack_transposed(job.key, shape.key_stride, shape.size, job.m, keys);
    pack.pack(job.value, shape.value_stride, job.m, shape.size, values);
  }

  void block(const AttentionJob<Q, KV>& job, std::int64_t first, std::int64_t n, const float* keys,
             const cpu::Panels& values, float* work) const {
    kernels.attention<Q>().attend(job.query + first * shape.query_stride, shape.query_stride, n,
                                  {keys, shape.size, job.m}, values, shape.scale,
                                  shape.causal ? first + 1 : job.m,
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
        kernels.pack<KV>().pack_transposed(job.key, shape.key_stride, shape.size, job.m, memory);
        const cpu::Panels right =
            kernels.panels(job.value, shape.value_stride, job.m, shape.size, job.n, memory + keys);
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
    at::parallel_for(0, count, grain(m * shape.size * 4),
                     [&](std::int64_t begin, std::int64_t end) {
                       for (std::int64_t i = begin; i < end; ++i) {
                         float* mine = packed + i * (keys + values);
                         pack(jobs[i], mine, mine + keys);
                       }
                     });
    at::parallel_for(0, count * blocks, grain(step * m * shape.size * 4),
                     [&](std::int64_t begin, std::int64_t end) {
                       float* work =
                           scratch(kernels.attention_scratch(step, shape.size, m, shape.size));
                       for (std::int64_t i = begin; i < end; ++i) {
                         const std::int64_t head = i / blocks, first = i % blocks * step;
                         const float* mine = packed + head * (keys + values);
                         block(jobs[head], first, std::min(step, n - first), mine,
                               {mine + keys, m, shape.size}, work);
                       }
                     });
  }
};

}  // namespace

template <class Q, class KV>
void attend(const std::vector<AttentionJob<Q, KV>>& jobs, const AttentionShape& shape) {
  const Runner<Q, KV> runner{cpu::kernels(), shape};
  const auto is_short = [](const auto& job) { return job.n <= query_block(job.m); };
  for (std::size_t first = 0; first < jobs.size();) {
    const auto& head = jobs[first];
    std::size_t last = first;
    if (is_short(head)) {
      std::int64_t work = 0;
      for (; last < jobs.size() && is_short(jobs[last]); ++last)
        work += jobs[last].n * jobs[last].m * shape.size * 4;
      runner.short_jobs(jobs.data() + first, static_cast<std::int64_t>(last - first), work);
    } else {
      while (last < jobs.size() && jobs[last].n == head.n && jobs[last].m == head.m) ++last;
      runner.long_jobs(jobs.data() + first, static_cast<std::int64_t>(last - first));
    }
    first = last;
  }
}

template void attend(const std::vector<AttentionJob<float, float>>&, const AttentionShape&);
template void attend(const std::vector<AttentionJob<float, bf16>>&, const AttentionShape&);
template void attend(const std::vector<AttentionJob<bf16, float>>&, const AttentionShape&);
template void attend(const std::vector<AttentionJob<bf16, bf16>>&, const AttentionShape&);

}  // namespace blip_trace::ops
