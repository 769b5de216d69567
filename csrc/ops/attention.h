// Attention of many query rows on sets of keys, spread over the threads.
#pragma once

#include <vector>

#include "common.h"

namespace blip_trace::ops {

// One head of one run or group: n query rows on m keys.
template <class Q, class KV>
struct AttentionJob {
  const Q* query;
  std::int64_t n;
  const KV* key;
  const KV* value;
  std::int64_t m;
  Q* out;
};

// What all jobs share. `size` is that of a head, of the keys and the values alike.
struct AttentionShape {
  std::int64_t size;
  std::int64_t query_stride, key_stride, value_stride, out_stride;
  float scale;
  bool causal;
};

// `out` may be `query`: a block's queries are read before its result is written.
template <class Q, class KV>
void attend(const std::vector<AttentionJob<Q, KV>>& jobs, const AttentionShape& shape);

// Whether torch's attention is to be taken for all heads of n query rows on m keys: where the
// processor has tiles for bfloat16 it uses them, which the kernels do not. A few rows do not fill
// them.
bool by_torch(const Tensor& query, std::int64_t n, std::int64_t m);

// That: query [n, C], keys and values [m, C], `out` [n, C], heads side by side.
void attend_by_torch(const Tensor& query, const Tensor& keys, const Tensor& values,
                     std::int64_t heads, bool causal, Tensor out);

extern template void attend(const std::vector<AttentionJob<float, float>>&, const AttentionShape&);
extern template void attend(const std::vector<AttentionJob<float, bf16>>&, const AttentionShape&);
extern template void attend(const std::vector<AttentionJob<bf16, bf16>>&, const AttentionShape&);

}  // namespace blip_trace::ops
