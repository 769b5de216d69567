// attend_states, where attend_states_bf16.cuh does not take it: a warp takes four heads of a row,
// so that a state that it has loaded and widened serves four. Groups have few states (the tokens of
// a question) but wide ones: a lane holds some columns of four queries, and of eight states it adds
// up its part of the 32 scores. The states are read again for the weighted sum and by the warps
// beside, which take the row's other heads or rows of the same group: from the first-level cache.
#include <tensor_cores.cuh>

#include "attend_states_bf16.cuh"
#include "device.cuh"

namespace blip_trace::cuda {
namespace states {
namespace {

constexpr int heads_at_once = 4, states_at_once = 8;  // their product is a warp's lanes
constexpr int most_warps = 8;

// Lane i gets the sum of all lanes' value i. At each step a lane gives away the half of its values
// that others will finish: 31 shuffles in all, where 32 sums alone would be 160.
template <int count>
__device__ __forceinline__ float sum_of_lane(const float (&values)[count]) {
  if constexpr (count == 1) {
    return values[0];
  } else {
    constexpr int half = count / 2;
    const bool upper = (threadIdx.x & half) != 0;
    float rest[half];
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? values[i] : values[i + half];
      const float taken = upper ? values[i + half] : values[i];
      rest[i] = taken + __shfl_xor_sync(whole_warp, given, half);
    }
    return sum_of_lane(rest);
  }
}

// Over the lanes of one head, which are every fourth.
template <class Combine>
__device__ __forceinline__ float all_of_head(float x, Combine combine) {
#pragma unroll
  for (int other = heads_at_once; other < warp_size; other *= 2)
    x = combine(x, __shfl_xor_sync(whole_warp, x, other));
  return x;
}

// Of lane i: the score of head i % 4 and state i / 4 of eight from `first` on.
template <int count, class T>
__device__ __forceinline__ float score(const Work<T>& work, int first) {
  float dot[warp_size] = {};
  const T* states = work.states + first * work.width;
  const int lane = threadIdx.x % warp_size, present = work.count - first;
  for (int64_t column = lane * count; column < work.width; column += warp_size * count) {
    float query[heads_at_once][count];
#pragma unroll
    for (int h = 0; h < heads_at_once; ++h)  // the last head again where there is none
      load(work.query + min(h, work.heads - 1) * work.head_stride + column, query[h]);
#pragma unroll
    for (int j = 0; j < states_at_once; ++j) {
      if (j < present) {
        float state[count];
        load(states + j * work.width + column, state);
#pragma unroll
        for (int h = 0; h < heads_at_once; ++h) {
#pragma unroll
          for (int i = 0; i < count; ++i) dot[j * heads_at_once + h] += query[h][i] * state[i];
        }
      }
    }
  }
  return sum_of_lane(dot) * work.factor;
}

// Makes weights [states, heads_at_once] of the scores; returns the sum of those of a lane's head.
// In between, a lane reads only what it has written itself, all of it of one head.
template <int count, class T>
__device__ __forceinline__ float weigh(const Work<T>& work, float* weights) {
  const int lane = threadIdx.x % warp_size;
  float maximum = -INFINITY;
  for (int first = 0; first < work.count; first += states_at_once) {
    const float mine = score<count>(work, first);
    if (first + lane / heads_at_once < work.count) {
      weights[first * heads_at_once + lane] = mine;
      maximum = fmaxf(maximum, mine);
    }
  }
  maximum = all_of_head(maximum, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0.0f;
  for (int i = lane; i < work.count * heads_at_once; i += warp_size) {
    weights[i] = ptx::exp2_of(weights[i] - maximum);
    sum += weights[i];
  }
  __syncwarp();
  return all_of_head(sum, [](float a, float b) { return a + b; });
}

template <int count, class T>
__device__ __forceinline__ void attend(const Work<T>& work, float* weights) {
  const float sum = weigh<count>(work, weights);
  float scale[heads_at_once];
#pragma unroll
  for (int h = 0; h < heads_at_once; ++h) scale[h] = 1.0f / __shfl_sync(whole_warp, sum, h);
  const int64_t first = threadIdx.x % warp_size * count;
  for (int64_t column = first; column < work.width; column += warp_size * count) {
    float sums[heads_at_once][count] = {};
    const T* states = work.states + column;
#pragma unroll 4
    for (int j = 0; j < work.count; ++j, states += work.width) {
      float weight[heads_at_once], state[count];
      load(weights + j * heads_at_once, weight);
      load(states, state);
#pragma unroll
      for (int h = 0; h < heads_at_once; ++h) {
#pragma unroll
        for (int i = 0; i < count; ++i) sums[h][i] += weight[h] * state[i];
      }
    }
#pragma unroll
    for (int h = 0; h < heads_at_once; ++h) {
#pragma unroll
      for (int i = 0; i < count; ++i) sums[h][i] *= scale[h];
      if (h < work.heads) store(work.out + h * work.head_stride + column, sums[h]);
    }
  }
}

// A job for each warp: `parts` of them make a row. There is room for the weights of `room` states.
template <class T, int count>
__global__ void __launch_bounds__(most_warps* warp_size)
    attend_states_kernel(const AttendStates a, unsigned parts, int room) {
  const unsigned warp = threadIdx.x / warp_size;
  const unsigned job = blockIdx.x * (blockDim.x / warp_size) + warp;
  const int64_t row = job / parts;
  if (row >= a.rows) return;
  const int head = static_cast<int>(job % parts) * heads_at_once;
  const Work<T> work(a, row, head, heads_at_once);
  if (work.count <= room) {
    attend<count>(work, reinterpret_cast<float*>(shared_memory) + warp * room * heads_at_once);
  } else {
    for (int h = 0; h < work.heads; ++h) attend_without_room<count>(work, h);
  }
}

// A block takes whole rows where it can: its warps share the states. Where there are few jobs,
// there is room for the states of an image; else rather for more warps and a larger first-level
// cache.
template <class T, int count>
const char* run(const AttendStates& a, Stream stream) {
  const auto parts = static_cast<unsigned>(ceil_div(a.heads, heads_at_once));
  const unsigned warps = parts < most_warps ? most_warps / parts * parts : most_warps;
  const int64_t jobs = a.rows * parts;
  const int room = jobs < 1024 ? 1024 : 128;
  return launch(attend_states_kernel<T, count>, ceil_div(jobs, warps), warps * warp_size,
                warps * room * heads_at_once * sizeof(float), stream, a, parts, room);
}

}  // namespace
}  // namespace states

const char* attend_states(const AttendStates& a, Stream stream) {
  if (a.rows == 0 || a.groups == 0 || a.heads == 0) return nullptr;
  if (states::tensor_cores::fits(a)) return states::tensor_cores::run(a, stream);
  return with_type(a.type, [&](auto element) {
    using T = decltype(element);
    const bool aligned = a.width % per_load<T> == 0 && is_aligned(a.query) &&
                         is_aligned(a.states) && is_aligned(a.out);
    return aligned ? states::run<T, per_load<T>>(a, stream) : states::run<T, 1>(a, stream);
  });
}

}  // namespace blip_trace::cuda
