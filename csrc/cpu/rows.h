// Passes over the rows of a matrix product.
#pragma once

#include "vec.h"

namespace blip_trace::cpu::BLIP_TRACE_ISA {

// Calls f(column, load, store) for whole vectors and then for what is left of a row.
template <class F>
BLIP_TRACE_INLINE void for_columns(int64_t cols, F f) {
  int64_t c = 0;
  for (; c + width <= cols; c += width) {
    f(c, [](auto* p) { return load(p); }, [](auto* p, Vec v) { store(p, v); });
  }
  if (const int64_t rest = cols - c) {
    f(
        c, [rest](auto* p) { return load_part(p, rest); },
        [rest](auto* p, Vec v) { store_part(p, v, rest); });
  }
}

static void widen(const bf16* from, float* to, int64_t count) {
  for_columns(count, [=](int64_t c, auto get, auto put) { put(to + c, get(from + c)); });
}

template <class T>
static void add_bias_gelu(const T* bias, T* y, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r, y += cols) {
    for_columns(cols, [=](int64_t c, auto get, auto put) {
      put(y + c, gelu_of(bias ? get(y + c) + get(bias + c) : get(y + c)));
    });
  }
}

template <class In, class Out>
static void add_norm(const AddNorm<In, Out>& args, int64_t begin, int64_t end, float* total) {
  const int64_t cols = args.cols;
  for (int64_t i = begin; i < end; ++i) {
    const Out* residual = args.residual + (args.residual_rows ? args.residual_rows[i] : i) * cols;
    const In* update = args.update + (args.update_rows ? args.update_rows[i] : i) * cols;
    const Out* bias = args.bias;
    Out* sum = args.sum ? args.sum + i * cols : nullptr;
    Vec sums{};
    for_columns(cols, [&](int64_t c, auto get, auto put) {
      Vec v = get(update + c);
      if (bias) v += get(bias + c);
      v += get(residual + c);
      sums += v;
      put(total + c, v);
      if (sum) put(sum + c, v);
    });
    const float mean = sum_of(sums) / static_cast<float>(cols);
    Vec squares{};
    int64_t c = 0;
    for (; c + width <= cols; c += width) {
      const Vec v = load(total + c) - mean;
      squares += v * v;
    }
    float square = sum_of(squares);
    for (; c < cols; ++c) square += (total[c] - mean) * (total[c] - mean);
    const float scale = 1.0f / __builtin_sqrtf(square / static_cast<float>(cols) + args.eps);
    Out* normed = args.normed + i * cols;
    for_columns(cols, [&](int64_t at, auto get, auto put) {
      put(normed + at,
          (get(total + at) - mean) * scale * get(args.norm_weight + at) + get(args.norm_bias + at));
    });
  }
}

template <class In, class Out>
static void log_sum_exp(const In* x, const Out* bias, int64_t cols, float* max, float* sum) {
  Vec most = splat(-infinity);
  int64_t c = 0;
  for (; c + width <= cols; c += width) most = maximum(load(x + c) + load(bias + c), most);
  const int64_t rest = cols - c;
  Vec last = splat(-infinity);
  if (rest) {
    float lanes[width];
    store(lanes, load_part(x + c, rest) + load_part(bias + c, rest));
    for (int64_t i = rest; i < width; ++i) lanes[i] = -infinity;
    last = load(lanes);
    most = maximum(last, most);
  }
  const float before = *max;
  const float now = maximum_of(most);
  const float next = now > before ? now : before;
  *max = next;
  // Nothing but -inf so far, or +inf: the difference to the maximum would be NaN.
  const float from = next == infinity || next == -infinity ? 0.0f : next;
  Vec sums{};
  for (int64_t at = 0; at + width <= cols; at += width) {
    sums += exp2_of((load(x + at) + load(bias + at) - from) * log2_of_e);
  }
  if (rest) sums += exp2_of((last - from) * log2_of_e);
  const float rescale = before == -infinity ? 0.0f : __builtin_expf(before - from);
  *sum = *sum * (before == next ? 1.0f : rescale) + sum_of(sums);
}

}  // namespace blip_trace::cpu::BLIP_TRACE_ISA
