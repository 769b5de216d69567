// Attention of a block of queries on all keys of one head: scores, softmax and weighted sum while
// the scores are in the second-level cache.
#pragma once

#include "product.h"
#include "vec.h"

namespace blip_trace::cpu::BLIP_TRACE_ISA {

// A row of weights as the product takes them: floats in the place of the scores.
struct FloatWeights {
  using Word = float;
  static constexpr int64_t per_word = 1;
  float* row;
  void put(int64_t i, Vec e) const { store(row + i, e); }
  void clear(int64_t i) const { row[i] = 0.0f; }
};

#if BLIP_TRACE_BF16_PRODUCTS
// Or bfloat16, which end before the scores that are still to be read.
struct PairWeights {
  using Word = Pair;
  static constexpr int64_t per_word = 2;
  float* row;
  void put(int64_t i, Vec e) const { store(reinterpret_cast<bf16*>(row) + i, e); }
  void clear(int64_t i) const { reinterpret_cast<bf16*>(row)[i] = {}; }
};
#endif

// Replaces `count` scores by 2^(factor * (score - maximum)) and what is behind them, up to `end`, by
// zeros; returns the sum. A NaN among them makes the sum NaN (the maximum passes over it, the
// exponential does not). There is room for whole vectors.
template <class Weights>
static float exponentials(float* scores, int64_t count, int64_t end, float factor) {
  const Weights weights{scores};
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
  const Vec max = splat(factor * maximum_of(maximum(maximum(most[0], most[1]),
                                                    maximum(most[2], most[3]))));
  Vec sums[2] = {};
  for (i = 0; i + 2 * width <= padded; i += 2 * width) {
    Vec e[2];
    for (int j = 0; j < 2; ++j) e[j] = exp2_of(load(scores + i + j * width) * factor - max);
    for (int j = 0; j < 2; ++j) {
      sums[j] += e[j];
      weights.put(i + j * width, e[j]);
    }
  }
  for (; i < padded; i += width) {
    const Vec e = exp2_of(load(scores + i) * factor - max);
    sums[0] += e;
    weights.put(i, e);
  }
  // What the padding of the last vector added is 2^-100 each.
  for (i = count; i < end; ++i) weights.clear(i);
  return sum_of(sums[0] + sums[1]);
}

template <class Weights, class T>
static void attend(const T* query, int64_t query_stride, int64_t n, const Panels& keys,
                   const Panels& values, float scale, int64_t visible, T* out, int64_t out_stride,
                   float* scratch) {
  using Word = typename Weights::Word;
  constexpr int64_t per_word = Weights::per_word;
  const int64_t d = keys.k, m = keys.n, d_v = values.n;
  const int64_t d_padded = round_up(d, width), m_padded = round_up(m, width),
                v_padded = round_up(d_v, width);
  float* copy = scratch;                            // [n, d]
  float* scores = copy + n * d_padded;              // [n, m]
  float* context = scores + n * m_padded;           // [n, d_v]
  float* sums = context + n * v_padded;             // [n]
  const int64_t seen = min_of(m, visible + n - 1);  // by the block's last row
  const auto* left = reinterpret_cast<const Word*>(query);
  int64_t left_stride = query_stride / per_word;
  if constexpr (sizeof(T) * per_word != sizeof(Word)) {
    copy_rows(query, query_stride, n, d, copy, d_padded);
    left = copy;
    left_stride = d_padded;
  }
  product(left, left_stride, n, d, seen, keys, scores, m_padded);
  const int64_t words = (seen + per_word - 1) / per_word;
  for (int64_t r = 0; r < n; ++r) {
    sums[r] = exponentials<Weights>(scores + r * m_padded, min_of(m, visible + r), words * per_word,
                                    scale * log2_of_e);
  }
  product(reinterpret_cast<const Word*>(scores), m_padded, n, words, d_v, values, context,
          v_padded);
  for (int64_t r = 0; r < n; ++r)
    copy_row(context + r * v_padded, 1.0f / sums[r], out + r * out_stride, d_v);
}

}  // namespace blip_trace::cpu::BLIP_TRACE_ISA
