// attend_states of bfloat16 on tensor cores: a block takes sixteen heads of a row, the rows of the
// products' left matrices, and each of its warps 64 columns: of the scores' sums and of the result.
//
// No matrix passes through shared memory. The sum of a product may run over the columns in any
// order that is the same for both sides, and its own columns may be any: so chosen that what a
// thread has to hold lies side by side, 16 bytes at a time.
#pragma once

#include <tensor_cores.cuh>

#include "attend_states.cuh"
#include "device.cuh"

namespace blip_trace::cuda::states::tensor_cores {

constexpr int heads_of_block = 16, columns_of_warp = 64;

// States are taken sixteen at a time; there is room for the scores of an image's.
constexpr int states_at_once = 16, room = 640;

// In the names of tensor_cores.cuh, a thread has of 16 heads and 16 states the scores of heads r
// and r + 8 (`half` 0 and 1) and states c, c + 1, c + 8 and c + 9.
struct Scores {
  float part[2][4];  // of 8 states: [half, state]

  __device__ __forceinline__ float& of(int half, int i) { return part[i / 2][half * 2 + i % 2]; }

  // In shared memory [2, warp_size], each thread's own.
  __device__ __forceinline__ void store(float4* to) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      to[i * warp_size + threadIdx.x % warp_size] =
          make_float4(part[i][0], part[i][1], part[i][2], part[i][3]);
  }

  __device__ __forceinline__ void load(const float4* from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 values = from[i * warp_size + threadIdx.x % warp_size];
      part[i][0] = values.x;
      part[i][1] = values.y;
      part[i][2] = values.z;
      part[i][3] = values.w;
    }
  }
};

// Which of sixteen states a thread's values `i` are of.
__device__ __forceinline__ int state_of(unsigned lane, unsigned i) {
  return lane % 4 * 2 + i % 2 + i / 2 * 8;
}

__device__ __forceinline__ uint4 load_or_zeros(const bf16* from, bool there) {
  return there ? load_packed<per_load<bf16>>(from) : make_uint4(0, 0, 0, 0);
}

// Of sixteen rows and the warp's columns what a thread multiplies: rows r and r + 8, and of 32
// columns eight, of which `column` is the first. Zeros where there is nothing.
struct Operand {
  uint4 words[2][2];  // [half, 32 columns]

  __device__ __forceinline__ Operand(const bf16* from, int64_t stride, int present, int width,
                                     int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = threadIdx.x % warp_size / 4 + half * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        words[half][i] = load_or_zeros(from + row * stride + column + i * 32,
                                       row < present && column + i * 32 < width);
    }
  }
};

// What the warp's columns contribute to the scores.
__device__ __forceinline__ Scores score(const Operand& query, const Operand& keys) {
  Scores scores = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 &low = query.words[0][i], &high = query.words[1][i];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint4& key = keys.words[part][i];
      ptx::multiply_add(scores.part[part], {low.x, high.x, low.y, high.y}, key.x, key.y);
      ptx::multiply_add(scores.part[part], {low.z, high.z, low.w, high.w}, key.z, key.w);
    }
  }
  return scores;
}

// Adds sixteen weighted states. Of 64 columns a thread takes eight, of which `column` is the first;
// product i has every eighth: 8 n + i.
__device__ __forceinline__ void add_weighted(const Scores& scores, const bf16* states, int width,
                                             int present, int column, float (&out)[8][4]) {
  unsigned weights[4], words[4][4];  // words: [state, four pairs of columns]
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weights[i] = pack(scores.part[i / 2][i % 2 * 2], scores.part[i / 2][i % 2 * 2 + 1]);
    const int state = state_of(threadIdx.x % warp_size, i);
    const uint4 value =
        load_or_zeros(states + state * width + column, state < present && column < width);
    words[i][0] = value.x;
    words[i][1] = value.y;
    words[i][2] = value.z;
    words[i][3] = value.w;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const unsigned halves = i % 2 == 0 ? 0x5410 : 0x7632;  // both lower ones, or both upper ones
    ptx::multiply_add(out[i], weights, __byte_perm(words[0][i / 2], words[1][i / 2], halves),
                      __byte_perm(words[2][i / 2], words[3][i / 2], halves));
  }
}

template <class Combine>
__device__ __forceinline__ float all_of_four(float x, Combine combine) {
  x = combine(x, __shfl_xor_sync(whole_warp, x, 1));
  return combine(x, __shfl_xor_sync(whole_warp, x, 2));
}

// Shared memory: [2, warps] Scores that the warps tell each other, two sets in turn, so that one
// barrier does where a warp may already write again; then [room / states_at_once] sums of them.
// `blocks` of `most_columns` columns run side by side: as many registers as a thread then gets.
template <int most_columns, int blocks>
__global__ void __launch_bounds__(most_columns / columns_of_warp* warp_size, blocks)
    attend_states_kernel(const AttendStates a) {
  constexpr int values = heads_of_block * states_at_once;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int warps = blockDim.x / warp_size, width = static_cast<int>(a.width);
  const int first_column = warp * columns_of_warp, column = first_column + lane % 4 * 8;
  const Work<bf16> work(a, blockIdx.x, blockIdx.y * heads_of_block, heads_of_block);
  if (work.count > room) {
    for (int h = warp; h < work.heads; h += warps) attend_without_room<per_load<bf16>>(work, h);
    return;
  }

  float* const parts = reinterpret_cast<float*>(shared_memory);
  float* const sums = parts + 2 * warps * values;
  Operand keys(work.states, width, work.count, width, column);
  const Operand query(work.query, work.head_stride, work.heads, width, column);
  for (int first = 0; first < work.count; first += states_at_once) {
    const int present = work.count - first, turn = first / states_at_once;
    float* const told = parts + turn % 2 * warps * values;
    score(query, keys).store(reinterpret_cast<float4*>(told + warp * values));
    const int next = first + states_at_once;  // they arrive while the sums are taken
    keys = Operand(work.states + next * width, width, work.count - next, width, column);
    __syncthreads();
    for (unsigned i = threadIdx.x; i < values; i += blockDim.x) {
      float sum = 0.0f;
#pragma unroll 4
      for (int j = 0; j < warps; ++j) sum += told[j * values + i];
      const int state = state_of(i / 4, i / (values / 2) * 2 + i % 2);
      sums[turn * values + i] = state < present ? sum * work.factor : -INFINITY;
    }
  }
  __syncthreads();

  Scores scores;
  float maximum[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
  for (int first = 0; first < work.count; first += states_at_once) {
    scores.load(reinterpret_cast<const float4*>(sums + first * heads_of_block));
#pragma unroll
    for (int i = 0; i < 8; ++i) maximum[i / 4] = fmaxf(maximum[i / 4], scores.of(i / 4, i % 4));
  }
#pragma unroll
  for (float& x : maximum) x = all_of_four(x, [](float a, float b) { return fmaxf(a, b); });
  float sum[2] = {}, out[8][4] = {};
  for (int first = 0; first < work.count; first += states_at_once) {
    scores.load(reinterpret_cast<const float4*>(sums + first * heads_of_block));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& mine = scores.of(i / 4, i % 4);
      mine = ptx::exp2_of(mine - maximum[i / 4]);
      sum[i / 4] += mine;
    }
    add_weighted(scores, work.states + first * width, width, work.count - first,
                 first_column + lane / 4 * 8, out);
  }

#pragma unroll
  for (float& x : sum)
    x = __fdividef(1.0f, all_of_four(x, [](float a, float b) { return a + b; }));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, head = lane / 4 + half * 8;
    const int at = first_column + lane % 4 * 16 + i % 2 * 8;
    float columns[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) columns[j] = out[j][half * 2 + i % 2] * sum[half];
    if (head < work.heads && at < width) store(work.out + head * work.head_stride + at, columns);
  }
}

constexpr int usual_columns = 768, most_columns = 1024;

inline bool fits(const AttendStates& a) {
  return a.type == Type::bfloat16 && a.width % per_load<bf16> == 0 && a.width <= most_columns &&
         is_aligned(a.query) && is_aligned(a.states) && is_aligned(a.out);
}

inline const char* run(const AttendStates& a, Stream stream) {
  const auto kernel = a.width <= usual_columns ? attend_states_kernel<usual_columns, 2>
                                               : attend_states_kernel<most_columns, 1>;
  const auto warps = static_cast<unsigned>(ceil_div(a.width, columns_of_warp));
  const std::size_t scores = sizeof(float) * heads_of_block * states_at_once;
  return launch(kernel, dim3(a.rows, ceil_div(a.heads, heads_of_block)), warps * warp_size,
                (2 * warps + room / states_at_once) * scores, stream, a);
}

}  // namespace blip_trace::cuda::states::tensor_cores
