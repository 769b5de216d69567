// Attention on the float32 units, float32: the tensor cores would round what they multiply to ten
// bits.
#pragma once

#include "attention_tiles.cuh"

namespace blip_trace::cuda::in_float {

// A team of `warps` warps works on a tile of queries, 16 rows a warp, and takes in `keys` keys at a
// time. In a warp, lane l has rows l / 8 + 4 * i, of scores keys l % 8 + 8 * j, and of the result
// columns l % 8 * 4 + 32 * b and the three behind: whatever eight neighboring lanes read at once
// lies in different banks or is the same.
template <int head_, int warps_, int keys_>
struct Team {
  static constexpr int head = head_, warps = warps_, keys = keys_;
  static constexpr int threads = warp_size * warps, teams = warps == 1 ? 2 : 1;
  static constexpr int rows = 16 * warps;
  static constexpr int chunks = head / 4;       // of a row
  static constexpr int stride = chunks + 1;     // chunks from one row to the next
  static constexpr int weights = keys / 4 + 2;  // likewise, of weights
  static constexpr int shared = (rows + 2 * keys) * stride + rows * weights;  // chunks a team
  static constexpr int shared_bytes = teams * shared * 16;
  // Blocks that registers and shared memory of a processor (sm_90) are to have room for.
  static constexpr int together = warps == 1 ? 4 : head <= 64 ? 3 : 2;
};

// A thread's part of its warp's rows.
template <class Team>
struct Rows {
  float4 context[4][Team::head / 32];
  Softmax softmax[4];
};

// And of their scores, later weights, for a tile of keys.
template <class Team>
using Scores = float[4][Team::keys / 8];

__device__ __forceinline__ void add_product(float& sum, const float4& a, const float4& b) {
  sum += a.x * b.x;
  sum += a.y * b.y;
  sum += a.z * b.z;
  sum += a.w * b.w;
}

__device__ __forceinline__ void add_product(float4& sum, float a, const float4& b) {
  sum.x += a * b.x;
  sum.y += a * b.y;
  sum.z += a * b.z;
  sum.w += a * b.w;
}

// scores += query keys^T, both from the lane's first row on.
template <class Team>
__device__ __forceinline__ void multiply_keys(const float4* query, const float4* keys,
                                              Scores<Team>& scores) {
#pragma unroll 4
  for (int c = 0; c < Team::chunks; ++c) {
    float4 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = query[4 * i * Team::stride + c];
#pragma unroll
    for (int j = 0; j < Team::keys / 8; ++j) {
      const float4 k = keys[8 * j * Team::stride + c];
#pragma unroll
      for (int i = 0; i < 4; ++i) add_product(scores[i][j], q[i], k);
    }
  }
}

// Scores become weights, of keys that a query does not see zero. `seen`: keys of the tile that the
// lane's first row sees.
template <class Team>
__device__ __forceinline__ void weigh(Rows<Team>& rows, Scores<Team>& scores, float factor,
                                      int seen, int growth, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < Team::keys / 8; ++j) {
      if (lane % 8 + 8 * j >= seen + 4 * i * growth) scores[i][j] = -INFINITY;
      largest = fmaxf(largest, scores[i][j]);
    }
    Softmax& softmax = rows.softmax[i];
    float shift;
    const float keep = softmax.raise(maximum_of_row<8>(largest), factor, shift);
#pragma unroll
    for (int j = 0; j < Team::keys / 8; ++j)
      scores[i][j] = softmax.weigh(scores[i][j], factor, shift);
#pragma unroll
    for (int b = 0; b < Team::head / 32; ++b) {
      float4& sum = rows.context[i][b];
      sum = make_float4(sum.x * keep, sum.y * keep, sum.z * keep, sum.w * keep);
    }
  }
}

// context += weights values, from the lane's first row and column on.
template <class Team>
__device__ __forceinline__ void multiply_values(Rows<Team>& rows, const float4* weights,
                                                const float4* values) {
#pragma unroll 2
  for (int k = 0; k < Team::keys / 4; ++k) {
    float4 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = weights[4 * i * Team::weights + k];
#pragma unroll
    for (int b = 0; b < Team::head / 32; ++b) {
      float4 v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = values[(4 * k + j) * Team::stride + 8 * b];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float4& sum = rows.context[i][b];
        add_product(sum, w[i].x, v[0]);
        add_product(sum, w[i].y, v[1]);
        add_product(sum, w[i].z, v[2]);
        add_product(sum, w[i].w, v[3]);
      }
    }
  }
}

// The lane's columns of a row, divided by the row's sum of weights. `out`: where the head begins.
template <class Team, bool whole>
__device__ __forceinline__ void store(const float4 (&context)[Team::head / 32], float sum,
                                      float* out, int head_size, int lane) {
  const float inverse = 1.0f / sum;
#pragma unroll
  for (int b = 0; b < Team::head / 32; ++b) {
    const int chunk = lane % 8 + 8 * b;
    const float4 c = make_float4(context[b].x * inverse, context[b].y * inverse,
                                 context[b].z * inverse, context[b].w * inverse);
    if constexpr (whole) {
      if (4 * chunk < head_size) reinterpret_cast<float4*>(out)[chunk] = c;
    } else {
      const float values[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (4 * chunk + e < head_size) out[4 * chunk + e] = values[e];
      }
    }
  }
}

template <class Team, bool whole>
__global__ void __launch_bounds__(Team::threads* Team::teams, Team::together)
    attend(Attention a, int numbers) {
  const int team = threadIdx.x / Team::threads, thread = threadIdx.x % Team::threads;
  const int warp = thread / warp_size, lane = thread % warp_size;
  const int number = static_cast<int>(blockIdx.x) * Team::teams + team;
  View view;
  if (number >= numbers || !find_view<Team::rows>(a, number, view)) return;
  const int column = view.head * a.head_size, keys = view.keys();
  float4* query = reinterpret_cast<float4*>(shared_memory) + team * Team::shared;
  float4* key = query + Team::rows * Team::stride;
  float4* value = key + Team::keys * Team::stride;
  float4* weights = value + Team::keys * Team::stride;
  const auto place = [](int r, int c) { return r * Team::stride + c; };
  const auto copy_keys = [&](int first, const void* matrix, int64_t stride, float4* to) {
    if (first < keys) {
      copy_rows<float, whole, Team::keys, Team::chunks, Team::threads>(
          matrix, columns_of<float>(column, stride), a.head_size, keys - first,
          [&](int r) { return view.row_of_key(first + r); }, reinterpret_cast<uint4*>(to), place,
          thread);
    }
    ptx::end_copy_group();
  };

  copy_rows<float, whole, Team::rows, Team::chunks, Team::threads>(
      a.query, columns_of<float>(column, a.query_stride), a.head_size, view.rows,
      [&](int r) { return view.first + r; }, reinterpret_cast<uint4*>(query), place, thread);
  copy_keys(0, a.key, a.key_stride, key);
  copy_keys(0, a.value, a.value_stride, value);

  const float factor = a.scale * log2_of_e;
  const int row = warp * 16 + lane / 8;  // the lane's first
  const int seen = view.seen + row * view.growth;
  float4* own_weights = weights + row * Team::weights;
  Rows<Team> rows = {};
  ptx::wait_for_copies<1>();
  wait_for_team<Team::warps>();
  // While a tile's keys are in use its values arrive, and while these are, the next tile's keys.
  for (int first = 0; first < keys; first += Team::keys) {
    Scores<Team> scores = {};
    multiply_keys<Team>(query + row * Team::stride, key + lane % 8 * Team::stride, scores);
    ptx::wait_for_copies<0>();
    wait_for_team<Team::warps>();
    copy_keys(first + Team::keys, a.key, a.key_stride, key);
    weigh<Team>(rows, scores, factor, seen - first, view.growth, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* to = reinterpret_cast<float*>(own_weights + 4 * i * Team::weights) + lane % 8;
#pragma unroll
      for (int j = 0; j < Team::keys / 8; ++j) to[8 * j] = scores[i][j];
    }
    __syncwarp();  // a row's weights are its warp's own
    multiply_values<Team>(rows, own_weights, value + lane % 8);
    ptx::wait_for_copies<0>();
    wait_for_team<Team::warps>();
    copy_keys(first + Team::keys, a.value, a.value_stride, value);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float sum = sum_of_row<8>(rows.softmax[i].sum);
    if (row + 4 * i >= view.rows) continue;
    float* out = static_cast<float*>(a.out) + (view.first + row + 4 * i) * a.out_stride + column;
    store<Team, whole>(rows.context[i], sum, out, a.head_size, lane);
  }
}

}  // namespace blip_trace::cuda::in_float
