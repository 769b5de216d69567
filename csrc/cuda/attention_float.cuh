// Attention on the float32 units, float32: the tensor cores would round the inputs to ten bits.
#pragma once

#include "attention_tiles.cuh"

namespace blip_trace::cuda {

// A team of `warps` warps works on a tile of queries, 16 rows a warp, and takes in `keys` keys at a
// time. In a warp, lane l has rows l / 8 + 4 * i of its 16, of the scores keys l % 8 + 8 * j and of
// the result columns l % 8 * 4 + 32 * b and the three behind: so wherever it reads, eight
// neighboring lanes read all banks.
template <int head_, int warps_, int keys_>
struct FloatTeam {
  static constexpr int head = head_, warps = warps_, keys = keys_;
  static constexpr int threads = 32 * warps, teams = warps == 1 ? 2 : 1;
  static constexpr int rows = 16 * warps;
  static constexpr int chunks = head / 4;            // of a row
  static constexpr int row = chunks + 1;             // chunks from one row to the next
  static constexpr int weights = keys / 4 + 2;       // likewise, of the weights
  static constexpr int shared = (rows + 2 * keys) * row + rows * weights;  // chunks a team
  static constexpr int shared_bytes = teams * shared * 16;
  static constexpr int together = warps == 1 ? 4 : head <= 64 ? 3 : 2;  // as of TensorTeam
};

template <class Team>
struct FloatRows {
  float4 context[4][Team::head / 32];
  Softmax softmax[4];
};

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

// s = query keys^T; both start at what the lane reads.
template <class Team>
__device__ __forceinline__ void multiply_keys(const float4* query, const float4* keys,
                                              float (&s)[4][Team::keys / 8]) {
#pragma unroll 4
  for (int c = 0; c < Team::chunks; ++c) {
    float4 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = query[4 * i * Team::row + c];
#pragma unroll
    for (int j = 0; j < Team::keys / 8; ++j) {
      const float4 k = keys[8 * j * Team::row + c];
#pragma unroll
      for (int i = 0; i < 4; ++i) add_product(s[i][j], q[i], k);
    }
  }
}

// Scores become weights, and sums so far lesser by as much as the largest score has grown. `seen`:
// how many of the tile's keys the lane's first row sees.
template <class Team>
__device__ __forceinline__ void weigh(FloatRows<Team>& rows, float (&s)[4][Team::keys / 8],
                                      float factor, int seen, int growth, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < Team::keys / 8; ++j) {
      if (lane % 8 + 8 * j >= seen + 4 * i * growth) s[i][j] = -INFINITY;
      largest = fmaxf(largest, s[i][j]);
    }
    Softmax& softmax = rows.softmax[i];
    float shift;
    const float keep = softmax.raise(maximum_of_row<8>(largest), factor, shift);
#pragma unroll
    for (int j = 0; j < Team::keys / 8; ++j) {
      s[i][j] = ptx::exp2_of(s[i][j] * factor - shift);
      softmax.sum += s[i][j];
    }
#pragma unroll
    for (int b = 0; b < Team::head / 32; ++b) {
      float4& c = rows.context[i][b];
      c = {c.x * keep, c.y * keep, c.z * keep, c.w * keep};
    }
  }
}

// context += weights values.
template <class Team>
__device__ __forceinline__ void multiply_values(FloatRows<Team>& rows, const float4* weights,
                                                const float4* values) {
#pragma unroll 2
  for (int k = 0; k < Team::keys / 4; ++k) {
    float4 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = weights[4 * i * Team::weights + k];
#pragma unroll
    for (int b = 0; b < Team::head / 32; ++b) {
      const float4* from = values + 4 * k * Team::row + 8 * b;
      const float4 v[4] = {from[0], from[Team::row], from[2 * Team::row], from[3 * Team::row]};
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

template <class Team, bool whole>
__global__ void __launch_bounds__(Team::threads* Team::teams, Team::together)
    attention_in_float(Attention a, int numbers) {
  const int team = threadIdx.x / Team::threads, thread = threadIdx.x % Team::threads;
  const int warp = thread / 32, lane = thread % 32, number = blockIdx.x * Team::teams + team;
  View view;
  if (number >= numbers || !find_view<Team::rows>(a, number, view)) return;
  const int column = view.head * a.head_size, keys = view.keys();
  float4* query = reinterpret_cast<float4*>(shared_memory) + team * Team::shared;
  float4* key = query + Team::rows * Team::row;
  float4* value = key + Team::keys * Team::row;
  float4* weights = value + Team::keys * Team::row;
  const auto place = [](int r, int c) { return r * Team::row + c; };
  const auto copy_keys = [&](int first, const void* from, int64_t stride, float4* to) {
    if (first < keys) {
      copy_rows<float, whole, Team::keys, Team::chunks, Team::threads>(
          from, columns_of<float>(column, stride), a.head_size, keys - first,
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
  FloatRows<Team> rows = {};
  ptx::wait_for_copies<1>();
  wait_for_team<Team::warps>();
  // While the keys of a tile are in use, its values arrive, and while those are, the next keys.
  for (int first = 0; first < keys; first += Team::keys) {
    float scores[4][Team::keys / 8] = {};
    multiply_keys<Team>(query + row * Team::row, key + lane % 8 * Team::row, scores);
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
    __syncwarp();
    multiply_values<Team>(rows, own_weights, value + lane % 8);
    ptx::wait_for_copies<0>();
    wait_for_team<Team::warps>();
    copy_keys(first + Team::keys, a.value, a.value_stride, value);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float inverse = 1.0f / sum_of_row<8>(rows.softmax[i].sum);
    if (row + 4 * i >= view.rows) continue;
    float* out = static_cast<float*>(a.out) + (view.first + row + 4 * i) * a.out_stride + column;
#pragma unroll
    for (int b = 0; b < Team::head / 32; ++b) {
      const float4& c = rows.context[i][b];
      const float values[4] = {c.x * inverse, c.y * inverse, c.z * inverse, c.w * inverse};
      const int at = lane % 8 * 4 + 32 * b;
      if constexpr (whole) {
        if (at < a.head_size)
          reinterpret_cast<float4*>(out)[lane % 8 + 8 * b] = make_float4(values[0], values[1], values[2], values[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (at + e < a.head_size) out[at + e] = values[e];
        }
      }
    }
  }
}

}  // namespace blip_trace::cuda
