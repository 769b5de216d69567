// attend_states of bfloat16 on tensor cores: a block takes sixteen heads of a row, which are the rows
// of a product's left matrix, and each of its warps 64 columns, of the scores' sums as of the result.
//
// No matrix passes through shared memory. A product's sum may run over the columns in any order that
// is the same for both sides, and its own columns may be any: so chosen that what a thread has to
// hold lies side by side, 16 bytes at a time.
#pragma once

#include <tensor_cores.cuh>

#include "device.cuh"

namespace blip_trace::cuda::states_bf16 {

constexpr int heads_of_block = 16, states_at_once = 16, columns_of_warp = 64, most_warps = 16;

__device__ __forceinline__ uint4 load_or_zeros(const bf16* from, bool there) {
  return there ? load_packed<per_load<bf16>>(from) : make_uint4(0, 0, 0, 0);
}

// The sum over the warps; the next call has to come with the other half of shared memory.
__device__ __forceinline__ void sum_over_warps(float4* parts, float (&mine)[2][4]) {
  const int lane = threadIdx.x % warp_size, warps = blockDim.x / warp_size;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    parts[threadIdx.x / warp_size * 2 * warp_size + i * warp_size + lane] =
        make_float4(mine[i][0], mine[i][1], mine[i][2], mine[i][3]);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) mine[i][0] = mine[i][1] = mine[i][2] = mine[i][3] = 0.0f;
#pragma unroll 2
  for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 part = parts[warp * 2 * warp_size + i * warp_size + lane];
      mine[i][0] += part.x;
      mine[i][1] += part.y;
      mine[i][2] += part.z;
      mine[i][3] += part.w;
    }
  }
}

// In the names of tensor_cores.cuh, a thread holds of 16 heads and 16 states the scores of heads r
// and r + 8 (`half` 0 and 1) and states c, c + 1, c + 8 and c + 9.
__global__ void __launch_bounds__(most_warps* warp_size) kernel(const AttendStates a) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int r = lane / 4, c = lane % 4 * 2;
  const int64_t row = blockIdx.x;
  const int head = blockIdx.y * heads_of_block + r;
  const int64_t head_stride = a.rows * a.width;
  const int64_t at = head * head_stride + row * a.width + warp * columns_of_warp;

  // Of 32 columns a thread takes eight, 4 c and those behind it: for two products.
  uint4 query[2][2];  // [half, 32 columns]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      query[half][i] = load_or_zeros(
          static_cast<const bf16*>(a.query) + at + 8 * half * head_stride + 32 * i + 4 * c,
          head + 8 * half < a.heads);
  }
  const int64_t group = group_of(a.query_starts, a.groups, row);
  const int32_t first_state = a.state_starts[group];
  const int count = a.state_starts[group + 1] - first_state;
  const bf16* states =
      static_cast<const bf16*>(a.states) + first_state * a.width + warp * columns_of_warp;
  const float factor = a.scale * log2_of_e;

  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float out[8][4] = {};  // product i has every eighth column: 8 n + i
  float4* parts = reinterpret_cast<float4*>(shared_memory);
  float4* next_parts = parts + blockDim.x * 2;
  for (int first = 0; first < count; first += states_at_once) {
    float scores[2][4] = {};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int state = first + 8 * tile + r;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 key =
            load_or_zeros(states + state * a.width + 32 * i + 4 * c, state < count);
        const uint4 &low = query[0][i], &high = query[1][i];
        ptx::multiply_add(scores[tile], {low.x, high.x, low.y, high.y}, key.x, key.y);
        ptx::multiply_add(scores[tile], {low.z, high.z, low.w, high.w}, key.z, key.w);
      }
    }
    // What the second product needs, of the same memory: it arrives while scores are exchanged.
    unsigned values[4][4];  // [state, words]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int state = first + c + i % 2 + i / 2 * 8;
      const uint4 words = load_or_zeros(states + state * a.width + 8 * r, state < count);
      values[i][0] = words.x;
      values[i][1] = words.y;
      values[i][2] = words.z;
      values[i][3] = words.w;
    }
    sum_over_warps(parts, scores);
    float4* const last_parts = parts;
    parts = next_parts;
    next_parts = last_parts;

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float next = maximum[half];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][half * 2 + i % 2];
        score = first + c + i % 2 + i / 2 * 8 < count ? score * factor : -INFINITY;
        next = fmaxf(next, score);
      }
      next = fmaxf(next, __shfl_xor_sync(whole_warp, next, 1));
      next = fmaxf(next, __shfl_xor_sync(whole_warp, next, 2));
      const float rescale = next == maximum[half] ? 1.0f : ptx::exp2_of(maximum[half] - next);
      maximum[half] = next;
      // Nothing but -inf so far: the difference to the maximum would be NaN.
      const float base = next == -INFINITY ? 0.0f : next;
      sum[half] *= rescale;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[i / 2][half * 2 + i % 2];
        score = ptx::exp2_of(score - base);
        sum[half] += score;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out[i][half * 2] *= rescale;
        out[i][half * 2 + 1] *= rescale;
      }
    }
    const unsigned weights[4] = {pack(scores[0][0], scores[0][1]), pack(scores[0][2], scores[0][3]),
                                 pack(scores[1][0], scores[1][1]), pack(scores[1][2], scores[1][3])};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned halves = i % 2 == 0 ? 0x5410 : 0x7632;  // both lower, or both upper
      ptx::multiply_add(out[i], weights, __byte_perm(values[0][i / 2], values[1][i / 2], halves),
                        __byte_perm(values[2][i / 2], values[3][i / 2], halves));
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(whole_warp, sum[half], 1);
    sum[half] += __shfl_xor_sync(whole_warp, sum[half], 2);
    const float scale = 1.0f / sum[half];
    if (head + 8 * half >= a.heads) continue;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float columns[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) columns[i] = out[i][half * 2 + n] * scale;
      store(static_cast<bf16*>(a.out) + at + 8 * half * head_stride + 8 * (c + n), columns);
    }
  }
}

inline bool fits(const AttendStates& a) {
  return a.width % columns_of_warp == 0 && a.width <= most_warps * columns_of_warp &&
         is_aligned(a.query) && is_aligned(a.states) && is_aligned(a.out);
}

inline const char* run(const AttendStates& a, Stream stream) {
  const auto threads = static_cast<unsigned>(a.width / columns_of_warp * warp_size);
  return launch(kernel, dim3(a.rows, ceil_div(a.heads, heads_of_block)), threads,
                threads * 4 * sizeof(float4), stream, a);
}

}  // namespace blip_trace::cuda::states_bf16
