// cross_attention: many query rows on few sets of states. A group's states are projected to keys
// and values, or the projections are absorbed into the query and the weighted sum, whichever is the
// smaller product.
#include <cmath>

#include <ATen/ops/_softmax.h>
#include <ATen/ops/mm.h>

#include "attention.h"
#include "gemm.h"

namespace blip_trace::ops {
namespace {

struct Group {
  std::int64_t query, n, state, m;
};

struct Args {
  Tensor query, states, key_weight, value_weight;
  std::int64_t heads, channels, size, width;  // width: that of the states
  float scale;
};

bool absorb(const Args& a, const Group& g) {
  const double projected = 4.0 * g.m * a.width * a.channels + 4.0 * g.n * g.m * a.channels;
  const double absorbed = g.n * (4.0 * a.channels * a.width + 4.0 * a.heads * g.m * a.width);
  return absorbed < projected;
}

template <class T>
void project(const Args& a, const Group& g, Tensor& out) {
  const Tensor states = a.states.narrow(0, g.state, g.m);
  const Tensor keys = linear(states, a.key_weight, std::nullopt);
  const Tensor values = linear(states, a.value_weight, std::nullopt);
  if (by_torch(a.query, g.n, g.m)) {
    attend_by_torch(a.query.narrow(0, g.query, g.n), keys, values, a.heads, false,
                    out.narrow(0, g.query, g.n));
    return;
  }
  std::vector<AttentionJob<T, T>> jobs;
  for (std::int64_t h = 0; h < a.heads; ++h) {
    const std::int64_t at = g.query * a.channels + h * a.size;
    jobs.push_back({const_data<T>(a.query) + at, g.n, const_data<T>(keys) + h * a.size,
                    const_data<T>(values) + h * a.size, g.m, data<T>(out) + at});
  }
  attend(jobs, {a.size, a.channels, a.channels, a.channels, a.channels, a.scale, false});
}

// c = a times a matrix for each head. Strides are between rows; head h has columns h * k of a and h
// * n of c.
template <class A, class C>
void multiply_heads(const A* a, std::int64_t a_stride, std::int64_t rows,
                    const std::vector<cpu::Panels>& right, C* c, std::int64_t c_stride) {
  constexpr std::int64_t step = 48;
  const cpu::Kernels& kernels = cpu::kernels();
  const std::int64_t blocks = (rows + step - 1) / step,
                     heads = static_cast<std::int64_t>(right.size());
  const std::int64_t k = right.front().k, n = right.front().n;
  at::parallel_for(0, heads * blocks, grain(2 * k * n * std::min(step, rows)),
                   [&](std::int64_t begin, std::int64_t end) {
                     float* work = scratch(kernels.product_scratch(step, k, n));
                     for (std::int64_t i = begin; i < end; ++i) {
                       const std::int64_t h = i / blocks, first = i % blocks * step;
                       kernels.product<A, C>().multiply(
                           a + first * a_stride + h * k, a_stride, std::min(step, rows - first),
                           right[h], c + first * c_stride + h * n, c_stride, work);
                     }
                   });
}

// On a whole image's states one group fills a GEMM, and GEMMs use all threads where the kernel, which
// takes a group as one head, packs the states on one.
constexpr std::int64_t many_states = 128;

// Replaces absorbed queries [n, H * D] by the weighted sums of the group's states.
void attend_by_gemm(const Args& a, const Group& g, const Tensor& absorbed) {
  Tensor rows = absorbed.view({g.n * a.heads, a.width});
  const Tensor states = a.states.narrow(0, g.state, g.m).to(at::kFloat);
  const Tensor scores = at::mm(rows, states.t()).mul_(a.scale);
  at::mm_out(rows, at::_softmax(scores, 1, false), states);
}

// Consecutive groups, together at most `rows` query rows (or one group).
template <class T>
void absorb(const Args& a, const std::vector<Group>& groups, Tensor& out) {
  const cpu::Kernels& kernels = cpu::kernels();
  const std::int64_t first = groups.front().query,
                     rows = groups.back().query + groups.back().n - first;
  const std::int64_t wide = a.heads * a.width;
  const auto floats = at::TensorOptions(at::kFloat);
  const std::int64_t head_size =
      std::max(kernels.packed_size(a.size, a.width), kernels.packed_size(a.width, a.size));
  const Tensor weights = at::empty({a.heads * head_size}, floats);
  const Tensor absorbed = at::empty({rows, wide}, floats);
  std::vector<cpu::Panels> right(static_cast<std::size_t>(a.heads));
  float* mixed = data<float>(absorbed);

  const auto for_heads = [&](auto f) {
    at::parallel_for(0, a.heads, grain(a.size * a.width * 4),
                     [&](std::int64_t begin, std::int64_t end) {
                       for (std::int64_t h = begin; h < end; ++h) f(h);
                     });
  };
  for_heads([&](std::int64_t h) {
    right[h] = kernels.panels(const_data<T>(a.key_weight) + h * a.size * a.width, a.width, a.size,
                              a.width, rows, data<float>(weights) + h * head_size);
  });
  multiply_heads(const_data<T>(a.query) + first * a.channels, a.channels, rows, right, mixed, wide);

  std::vector<AttentionJob<float, T>> jobs;
  for (const Group& g : groups) {
    if (g.n == 0) continue;
    if (g.m >= many_states) {
      attend_by_gemm(a, g, absorbed.narrow(0, g.query - first, g.n));
      continue;
    }
    const T* states = const_data<T>(a.states) + g.state * a.width;
    float* rows_of_group = mixed + (g.query - first) * wide;
    jobs.push_back({rows_of_group, g.n * a.heads, states, states, g.m, rows_of_group});
  }
  attend(jobs, {a.width, a.width, a.width, a.width, a.width, a.scale, false});

  for_heads([&](std::int64_t h) {
    float* packed = data<float>(weights) + h * head_size;
    kernels.pack<T>().pack_transposed(const_data<T>(a.value_weight) + h * a.size * a.width, a.width,
                                      a.width, a.size, packed);
    right[h] = {packed, a.width, a.size};
  });
  multiply_heads(mixed, wide, rows, right, data<T>(out) + first * a.channels, a.channels);
}

template <class T>
void run(const Args& a, const std::vector<Group>& groups, Tensor& out) {
  constexpr std::int64_t rows_at_once = 512;
  for (std::size_t i = 0; i < groups.size();) {
    if (!absorb(a, groups[i])) {
      project<T>(a, groups[i++], out);
      continue;
    }
    std::vector<Group> together;
    std::int64_t rows = 0;
    do {
      rows += groups[i].n;
      together.push_back(groups[i++]);
    } while (i < groups.size() && absorb(a, groups[i]) && rows + groups[i].n <= rows_at_once);
    absorb<T>(a, together, out);
  }
}

Tensor cross_attention(const Tensor& query, const Tensor& states, const Tensor& key_weight,
                       const Tensor& value_weight, const Tensor& query_starts,
                       const Tensor& state_starts, std::int64_t heads) {
  constexpr const char* op = "cross_attention";
  const at::AutoDispatchBelowADInplaceOrView guard;
  const std::int64_t parts = check_cross_attention(query, states, key_weight, value_weight,
                                                   query_starts, state_starts, heads);
  check_starts(op, "query_starts", query_starts, query.size(0));
  check_starts(op, "state_starts", state_starts, states.size(0));
  const std::int64_t channels = query.size(1), width = states.size(1);

  const auto* q = const_data<std::int32_t>(query_starts);
  const auto* s = const_data<std::int32_t>(state_starts);
  std::vector<Group> groups;
  groups.reserve(static_cast<std::size_t>(parts));
  for (std::int64_t g = 0; g < parts; ++g) {
    if (q[g] == q[g + 1]) continue;
    TORCH_CHECK_INDEX(s[g] < s[g + 1], "blip_trace::cross_attention: group ", g,
                      " has query rows but no states.");
    groups.push_back({q[g], q[g + 1] - q[g], s[g], s[g + 1] - s[g]});
  }
  const std::int64_t size = channels / heads;
  const Args args{query.contiguous(),
                  states.contiguous(),
                  key_weight.contiguous(),
                  value_weight.contiguous(),
                  heads,
                  channels,
                  size,
                  width,
                  1.0f / std::sqrt(static_cast<float>(size))};
  Tensor out = at::empty({query.size(0), channels}, query.options());
  with_type(query, [&](auto element) { run<decltype(element)>(args, groups, out); });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_trace, m) {
  m.def(
      "cross_attention(Tensor query, Tensor states, Tensor key_weight, Tensor value_weight, "
      "Tensor query_starts, Tensor state_starts, int heads) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(blip_trace, CPU, m) { m.impl("cross_attention", cross_attention); }

}  // namespace blip_trace::ops
