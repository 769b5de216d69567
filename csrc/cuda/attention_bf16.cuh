// Attention on tensor cores, bfloat16: scores stay in the registers in which the first product
// leaves them and are there the left operand of the second.
#pragma once

#include "attention_tiles.cuh"

namespace blip_trace::cuda {

// Bits only: the tensor cores compute.
using Bfloat16 = std::uint16_t;

// A team of `warps` warps works on a tile of queries, 16 * `blocks` rows a warp, and takes in
// `keys` keys at a time. Heads have `head` columns, those beyond the true ones are zero. Blocks of
// threads hold several teams if these are single warps, which never wait for each other.
template <int head_, int warps_, int blocks_, int keys_>
struct TensorTeam {
  static constexpr int head = head_, warps = warps_, blocks = blocks_, keys = keys_;
  static constexpr int threads = 32 * warps, teams = warps == 1 ? 4 : 1;
  static constexpr int rows_of_warp = 16 * blocks, rows = rows_of_warp * warps;
  static constexpr int chunks = head / 8;       // of a row
  static constexpr int stage = keys * chunks;   // chunks of the keys of one tile, or of the values
  static constexpr int shared = rows * chunks + 4 * stage;  // chunks a team
  static constexpr int shared_bytes = teams * shared * 16;
  // Blocks that a processor of sm_90 is to hold at once: its shared memory and its 65536 registers
  // have room for so many, with none spilled.
  static constexpr int together = head > 64 || blocks > 1 ? 2 : warps > 1 ? 3 : 4;
};

// Where chunk c of row r lies. Of eight rows that follow each other the chunks of one number lie in
// different banks: where rows are short, so many as fill all banks take turns together.
template <int chunks>
__device__ __forceinline__ int swizzled(int r, int c) {
  constexpr int rows_of_banks = chunks < 8 ? 8 / chunks : 1, places = chunks < 8 ? chunks : 8;
  return r * chunks + (c ^ (r / rows_of_banks % places));
}

// A thread's part of a tile of queries: rows lane / 4 and lane / 4 + 8 of each block of 16.
template <class Team>
struct TensorRows {
  std::uint32_t query[Team::blocks][Team::head / 16][4];
  float context[Team::blocks][Team::head / 8][4];
  Softmax softmax[Team::blocks][2];
};

// s = query keys^T.
template <class Team>
__device__ __forceinline__ void multiply_keys(const TensorRows<Team>& rows, const uint4* keys,
                                              int lane, float (&s)[Team::blocks][Team::keys / 8][4]) {
#pragma unroll
  for (int k = 0; k < Team::head / 16; ++k) {
    const uint4* from = keys + swizzled<Team::chunks>(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
#pragma unroll
    for (int n = 0; n < Team::keys / 16; ++n) {
      std::uint32_t b[4];
      ptx::load_matrices(b, from + n * 16 * Team::chunks);
#pragma unroll
      for (int i = 0; i < Team::blocks; ++i) {
        ptx::multiply_add(s[i][2 * n], rows.query[i][k], b[0], b[1]);
        ptx::multiply_add(s[i][2 * n + 1], rows.query[i][k], b[2], b[3]);
      }
    }
  }
}

// Scores of keys that a query does not see become -infinity. `seen`: by the thread's first row, of
// the tile's keys.
template <class Team>
__device__ __forceinline__ void mask(float (&s)[Team::blocks][Team::keys / 8][4], int seen,
                                     int growth, int lane) {
#pragma unroll
  for (int i = 0; i < Team::blocks; ++i) {
#pragma unroll
    for (int n = 0; n < Team::keys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = n * 8 + lane % 4 * 2 + e % 2;
        if (key >= seen + (i * 16 + e / 2 * 8) * growth) s[i][n][e] = -INFINITY;
      }
    }
  }
}

// Scores become weights, and sums so far lesser by as much as the largest score has grown.
template <class Team>
__device__ __forceinline__ void weigh(TensorRows<Team>& rows,
                                      float (&s)[Team::blocks][Team::keys / 8][4], float factor) {
#pragma unroll
  for (int i = 0; i < Team::blocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < Team::keys / 8; ++n)
        largest = fmaxf(largest, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
      Softmax& softmax = rows.softmax[i][half];
      float shift;
      const float keep = softmax.raise(maximum_of_row<4>(largest), factor, shift);
#pragma unroll
      for (int n = 0; n < Team::keys / 8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[i][n][e] = ptx::exp2_of(s[i][n][e] * factor - shift);
          softmax.sum += s[i][n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < Team::head / 8; ++n) {
        rows.context[i][n][2 * half] *= keep;
        rows.context[i][n][2 * half + 1] *= keep;
      }
    }
  }
}

// context += weights values.
template <class Team>
__device__ __forceinline__ void multiply_values(
    TensorRows<Team>& rows, const float (&weights)[Team::blocks][Team::keys / 8][4],
    const uint4* values, int lane) {
#pragma unroll
  for (int k = 0; k < Team::keys / 16; ++k) {
    std::uint32_t a[Team::blocks][4];
#pragma unroll
    for (int i = 0; i < Team::blocks; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* w = weights[i][2 * k + j / 2] + j % 2 * 2;
        a[i][j] = ptx::pair_of(w[0], w[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < Team::head / 16; ++n) {
      std::uint32_t b[4];
      ptx::load_transposed(b, values + swizzled<Team::chunks>(lane % 16, 2 * n + lane / 16) +
                                  k * 16 * Team::chunks);
#pragma unroll
      for (int i = 0; i < Team::blocks; ++i) {
        ptx::multiply_add(rows.context[i][2 * n], a[i], b[0], b[1]);
        ptx::multiply_add(rows.context[i][2 * n + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// The context, divided by its rows' sums of weights, comes into the warp's rows of shared memory...
template <class Team>
__device__ __forceinline__ void finish(const TensorRows<Team>& rows, uint4* to, int lane) {
#pragma unroll
  for (int i = 0; i < Team::blocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = 1.0f / sum_of_row<4>(rows.softmax[i][half].sum);
      const int row = i * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < Team::head / 8; ++n) {
        const float* c = rows.context[i][n] + 2 * half;
        auto* pairs = reinterpret_cast<std::uint32_t*>(to + swizzled<Team::chunks>(row, n));
        pairs[lane % 4] = ptx::pair_of(c[0] * inverse, c[1] * inverse);
      }
    }
  }
}

// ... and from there to where it belongs: rows of `out` from `first` on, as far as they are `there`.
template <class Team, bool whole>
__device__ __forceinline__ void store(const uint4* from, void* out, Columns columns, int head_size,
                                      int first, int there, int lane) {
  constexpr int rounds = Team::rows_of_warp * Team::chunks / warp_size;
#pragma unroll(whole ? rounds : 1)
  for (int round = 0; round < rounds; ++round) {
    const int i = round * warp_size + lane, r = i / Team::chunks, c = i % Team::chunks;
    const int count = r < there ? head_size - c * 8 : 0;
    const uint4* chunk = from + swizzled<Team::chunks>(r, c);
    unsigned char* to = static_cast<unsigned char*>(out) + columns.chunk(first + r, c);
    if constexpr (whole) {
      if (count > 0) *reinterpret_cast<uint4*>(to) = *chunk;
    } else {
      for (int j = 0; j < 8 && j < count; ++j)
        reinterpret_cast<Bfloat16*>(to)[j] = reinterpret_cast<const Bfloat16*>(chunk)[j];
    }
  }
}

template <class Team, bool whole>
__global__ void __launch_bounds__(Team::threads* Team::teams, Team::together)
    attention_on_tensor_cores(Attention a, int numbers) {
  const int team = threadIdx.x / Team::threads, thread = threadIdx.x % Team::threads;
  const int warp = thread / 32, lane = thread % 32, number = blockIdx.x * Team::teams + team;
  View view;
  if (number >= numbers || !find_view<Team::rows>(a, number, view)) return;
  const int column = view.head * a.head_size, keys = view.keys();
  // The rows of the warp's own queries, later of its results; then two stages of keys and values.
  uint4* shared = reinterpret_cast<uint4*>(shared_memory) + team * Team::shared;
  uint4* own = shared + warp * Team::rows_of_warp * Team::chunks;
  uint4* stages = shared + Team::rows * Team::chunks;
  const auto place = [](int r, int c) { return swizzled<Team::chunks>(r, c); };
  const auto copy_keys = [&](int first, uint4* to) {
    if (first < keys) {
      const auto copy = [&](const void* matrix, int64_t stride, uint4* to) {
        copy_rows<Bfloat16, whole, Team::keys, Team::chunks, Team::threads>(
            matrix, columns_of<Bfloat16>(column, stride), a.head_size, keys - first,
            [&](int r) { return view.row_of_key(first + r); }, to, place, thread);
      };
      copy(a.key, a.key_stride, to);
      copy(a.value, a.value_stride, to + Team::stage);
    }
    ptx::end_copy_group();
  };

  const int before = warp * Team::rows_of_warp;  // rows of the warps before
  copy_rows<Bfloat16, whole, Team::rows_of_warp, Team::chunks, warp_size>(
      a.query, columns_of<Bfloat16>(column, a.query_stride), a.head_size,
      view.rows - before,      [&](int r) { return first_row + r; }, own, place, lane);
  ptx::end_copy_group();
  copy_keys(0, stages);
  copy_keys(Team::keys, stages + 2 * Team::stage);

  TensorRows<Team> rows = {};
  ptx::wait_for_copies<2>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Team::blocks; ++i) {
#pragma unroll
    for (int k = 0; k < Team::head / 16; ++k)
      ptx::load_matrices(rows.query[i][k], own + i * 16 * Team::chunks +
                                               place(lane % 16, 2 * k + lane / 16));
  }

  const float factor = a.scale * log2_of_e;
  // Keys that the warp's first row sees, and its last.
  const int seen_first = view.seen + before * view.growth;
  const int seen_last = before < view.rows ? seen_first + (Team::rows_of_warp - 1) * view.growth : 0;
  int stage = 0;
  for (int first = 0; first < keys; first += Team::keys) {
    ptx::wait_for_copies<1>();
    wait_for_team<Team::warps>();
    if (first < seen_last) {
      float scores[Team::blocks][Team::keys / 8][4] = {};
      multiply_keys<Team>(rows, stages + stage, lane, scores);
      if (first + Team::keys > seen_first)
        mask<Team>(scores, seen_first - first + lane / 4 * view.growth, view.growth, lane);
      weigh<Team>(rows, scores, factor);
      multiply_values<Team>(rows, scores, stages + stage + Team::stage, lane);
    }
    wait_for_team<Team::warps>();
    copy_keys(first + 2 * Team::keys, stages + stage);
    stage ^= 2 * Team::stage;
  }

  finish<Team>(rows, own, lane);
  __syncwarp();
  store<Team, whole>(own, a.out, columns_of<Bfloat16>(column, a.out_stride), a.head_size,
                     view.first + before, view.rows - before, lane);
}

}  // namespace blip_trace::cuda
