// What the two ways of attend_states share.
#pragma once

#include <tensor_cores.cuh>

#include "device.cuh"

namespace blip_trace::cuda::states {

// What a warp or a block works on: some heads of a row, and the states of the row's group.
template <class T>
struct Work {
  const T *query, *states;
  T* out;
  int64_t head_stride, width;
  int heads, count;  // of states
  float factor;      // from scores to powers of two

  // Of `most_heads` heads from `head` on.
  __device__ __forceinline__ Work(const AttendStates& a, int64_t row, int head, int most_heads)
      : head_stride(a.rows * a.width),
        width(a.width),
        heads(min(most_heads, a.heads - head)),
        factor(a.scale * log2_of_e) {
    const int64_t at = head * head_stride + row * width;
    query = static_cast<const T*>(a.query) + at;
    out = static_cast<T*>(a.out) + at;
    const int64_t group = group_of(a.query_starts, a.groups, a.rows, row);
    const int32_t first = a.state_starts[group];
    states = static_cast<const T*>(a.states) + first * width;
    count = a.state_starts[group + 1] - first;
  }
};

// More states than there is room for weights: a head and a state at a time, all scores again for
// each part of the columns. Right, not fast.
template <int count, class T>
__device__ __forceinline__ void attend_without_room(const Work<T>& work, int h) {
  const int64_t step = warp_size * count, first = threadIdx.x % warp_size * count;
  const T* query = work.query + h * work.head_stride;
  for (int64_t part = 0; part < work.width; part += step) {
    const int64_t mine = part + first;
    float maximum = -INFINITY, sum = 0.0f, sums[count] = {};
    const T* states = work.states;
    for (int j = 0; j < work.count; ++j, states += work.width) {
      float dot = 0.0f, a[count], state[count] = {};
      for (int64_t column = first; column < work.width; column += step) {
        load(query + column, a);
        load(states + column, state);
#pragma unroll
        for (int i = 0; i < count; ++i) dot += a[i] * state[i];
      }
      const float score = warp_sum(dot) * work.factor, next = fmaxf(maximum, score);
      // Nothing but -inf so far: the difference to the maximum would be NaN.
      const float rescale = next == maximum ? 1.0f : ptx::exp2_of(maximum - next);
      const float weight = ptx::exp2_of(score - (next == -INFINITY ? 0.0f : next));
      maximum = next;
      sum = sum * rescale + weight;
      if (mine < work.width) load(states + mine, state);
#pragma unroll
      for (int i = 0; i < count; ++i) sums[i] = sums[i] * rescale + weight * state[i];
    }
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] /= sum;
    if (mine < work.width) store(work.out + h * work.head_stride + mine, sums);
  }
}

}  // namespace blip_trace::cuda::states
