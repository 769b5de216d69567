// Attention of a block of queries on all keys of one head: scores, softmax and weighted sum while
// the scores are in the second-level cache.
#pragma once

#include "product.h"
#include "vec.h"

namespace blip_trace::cpu::BLIP_TRACE_ISA {

// 2^(score - maximum) in place for `count` scores, zeros up to the next whole vector; returns their
// sum. A NaN among them makes the sum NaN (the maximum passes over it, the exponential does not).
static float exponentials(float* scores, int64_t count) {
  const int64_t padded = round_up(count, width);
  for (int64_t i = count; i < padded; ++i) scores[i] = -infinity;
  // Four maxima at a time: one alone would wait for itself.
  Vec most[4];
  for (Vec& v : most) v = splat(-infinity);
  int64_t i = 0;
  for (; i + 4 * width <= padded; i += 4 * width) {
    for (int j = 0; j < 4; ++j) most[j] = maximum(load(scores + i + j * width), most[j]);
  }
  for (; i < padded; i += width) most[0] = maximum(load(scores + i), most[0]);
  const Vec max = splat(maximum_of(maximum(maximum(most[0], most[1]), maximum(most[2], most[3]))));
  Vec sums[2] = {};
  for (i = 0; i + 2 * width <= padded; i += 2 * width) {
    for (int j = 0; j < 2; ++j) {
      const Vec e = exp2_of(load(scores + i + j * width) - max);
      sums[j] += e;
      store(scores + i + j * width, e);
    }
  }
  for (; i < padded; i += width) {
    const Vec e = exp2_of(load(scores + i) - max);
    sums[0] += e;
    store(scores + i, e);
  }
  for (i = count; i < padded; ++i) scores[i] = 0.0f;
  return sum_of(sums[0] + sums[1]);
}

template <class T>
static void attend(const T* query, int64_t query_stride, int64_t n, const Panels& keys,
                   const Panels& values, float scale, int64_t visible, T* out, int64_t out_stride,
                   float* scratch) {
  const int64_t d = keys.k, m = keys.n, d_v = values.n;
  const int64_t d_padded = round_up(d, width), m_padded = round_up(m, width),
                v_padded = round_up(d_v, width);
  float* left = scratch;                            // [n, d]
  float* scores = left + n * d_padded;              // [n, m]
  float* context = scores + n * m_padded;           // [n, d_v]
  const int64_t seen = min_of(m, visible + n - 1);  // by the block's last row
  copy_scaled(query, query_stride, n, d, scale * log2_of_e, left, d_padded);
  product(left, d_padded, n, d, seen, keys, scores, m_padded);
  float* sums = context + n * v_padded;  // [n]
  for (int64_t r = 0; r < n; ++r) {
    float* row = scores + r * m_padded;
    const int64_t count = min_of(m, visible + r);
    sums[r] = exponentials(row, count);
    for (int64_t i = round_up(count, width); i < seen; ++i) row[i] = 0.0f;
  }
  product(scores, m_padded, n, seen, d_v, values, context, v_padded);
  for (int64_t r = 0; r < n; ++r)
    copy_row(context + r * v_padded, 1.0f / sums[r], out + r * out_stride, d_v);
}

}  // namespace blip_trace::cpu::BLIP_TRACE_ISA
