// Attention on tensor cores, bfloat16: scores stay in the registers in which the first product
// leaves them and are there the left operand of the second.
#pragma once

#include "attention_tiles.cuh"

namespace blip_trace::cuda::in_bf16 {

// A team of `warps` warps works on a tile of queries, 16 * `blocks` rows a warp, and takes in
// `keys` keys at a time. Heads have `head` columns, those beyond the true ones zero. A block of
// threads holds several teams if they are single warps; they never wait for each other.
template <int head_, int warps_, int blocks_, int keys_>
struct Team {
  static constexpr int head = head_, warps = warps_, blocks = blocks_, keys = keys_;
  static constexpr int threads = warp_size * warps, teams = warps == 1 ? 4 : 1;
  static constexpr int rows_of_warp = 16 * blocks, rows = rows_of_warp * warps;
  static constexpr int chunks = head / 8;      // of a row
  static constexpr int stage = keys * chunks;  // chunks of a tile's keys, and as many of its values
  static constexpr int shared = rows * chunks + 4 * stage;  // chunks a team
  static constexpr int shared_bytes = teams * shared * 16;
  // Blocks that registers and shared memory of a processor (sm_90) are to have room for.
  static constexpr int together = head > 64 || blocks > 1 ? 2 : warps > 1 ? 3 : 4;
};

// A thread's part of its warp's rows: lane / 4 and lane / 4 + 8 of each block of 16.
template <class Team>
struct Rows {
  std::uint32_t query[Team::blocks][Team::head / 16][4];
  float context[Team::blocks][Team::head / 8][4];
  Softmax softmax[Team::blocks][2];
};

// And of their scores, later weights, for a tile of keys.
template <class Team>
using Scores = float[Team::blocks][Team::keys / 8][4];

// Where chunk c of row r lies. Chunks of one number of eight rows are to lie in different banks; of
// short rows, several side by side in all banks, so many are shifted together.
template <int chunks>
__device__ __forceinline__ int place_of(int r, int c) {
  constexpr int rows_of_banks = chunks < 8 ? 8 / chunks : 1, places = chunks < 8 ? chunks : 8;
  return r * chunks + (c ^ (r / rows_of_banks % places));
}

// scores += query keys^T.
template <class Team>
__device__ __forceinline__ void multiply_keys(const Rows<Team>& rows, const uint4* keys, int lane,
                                              Scores<Team>& scores) {
#pragma unroll
  for (int k = 0; k < Team::head / 16; ++k) {
    const int r = lane % 8 + lane / 16 * 8, c = 2 * k + lane / 8 % 2;
    const uint4* from = keys + place_of<Team::chunks>(r, c);
#pragma unroll
    for (int n = 0; n < Team::keys / 16; ++n) {
      std::uint32_t b[4];
      ptx::load_matrices(b, from + n * 16 * Team::chunks);
#pragma unroll
      for (int i = 0; i < Team::blocks; ++i) {
        ptx::multiply_add(scores[i][2 * n], rows.query[i][k], b[0], b[1]);
        ptx::multiply_add(scores[i][2 * n + 1], rows.query[i][k], b[2], b[3]);
      }
    }
  }
}

// Scores of keys that a query does not see become -infinity. `seen`: keys of the tile that the
// thread's first row sees.
template <class Team>
__device__ __forceinline__ void mask(Scores<Team>& scores, int seen, int growth, int lane) {
#pragma unroll
  for (int i = 0; i < Team::blocks; ++i) {
#pragma unroll
    for (int n = 0; n < Team::keys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = n * 8 + lane % 4 * 2 + e % 2, row = i * 16 + e / 2 * 8;
        if (key >= seen + row * growth) scores[i][n][e] = -INFINITY;
      }
    }
  }
}

// Scores become weights.
template <class Team>
__device__ __forceinline__ void weigh(Rows<Team>& rows, Scores<Team>& scores, float factor) {
#pragma unroll
  for (int i = 0; i < Team::blocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = 2 * half;
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < Team::keys / 8; ++n)
        largest = fmaxf(largest, fmaxf(scores[i][n][e], scores[i][n][e + 1]));
      Softmax& softmax = rows.softmax[i][half];
      float shift;
      const float keep = softmax.raise(maximum_of_row<4>(largest), factor, shift);
#pragma unroll
      for (int n = 0; n < Team::keys / 8; ++n) {
        scores[i][n][e] = softmax.weigh(scores[i][n][e], factor, shift);
        scores[i][n][e + 1] = softmax.weigh(scores[i][n][e + 1], factor, shift);
      }
#pragma unroll
      for (int n = 0; n < Team::head / 8; ++n) {
        rows.context[i][n][e] *= keep;
        rows.context[i][n][e + 1] *= keep;
      }
    }
  }
}

// context += weights values.
template <class Team>
__device__ __forceinline__ void multiply_values(Rows<Team>& rows, const Scores<Team>& weights,
                                                const uint4* values, int lane) {
#pragma unroll
  for (int k = 0; k < Team::keys / 16; ++k) {
    std::uint32_t a[Team::blocks][4];
#pragma unroll
    for (int i = 0; i < Team::blocks; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = weights[i][2 * k + j / 2] + j % 2 * 2;
        a[i][j] = ptx::pair_of(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < Team::head / 16; ++n) {
      const uint4* from = values + place_of<Team::chunks>(lane % 16, 2 * n + lane / 16);
      std::uint32_t b[4];
      ptx::load_transposed(b, from + k * 16 * Team::chunks);
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
__device__ __forceinline__ void finish(const Rows<Team>& rows, uint4* to, int lane) {
#pragma unroll
  for (int i = 0; i < Team::blocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = 1.0f / sum_of_row<4>(rows.softmax[i][half].sum);
      const int row = i * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < Team::head / 8; ++n) {
        const float* pair = rows.context[i][n] + 2 * half;
        auto* words = reinterpret_cast<std::uint32_t*>(to + place_of<Team::chunks>(row, n));
        words[lane % 4] = ptx::pair_of(pair[0] * inverse, pair[1] * inverse);
      }
    }
  }
}

// ... and from there to rows of `out` from `first` on, as far as they are `there`.
template <class Team, bool whole>
__device__ __forceinline__ void store(const uint4* from, void* out, Columns columns, int head_size,
                                      int first, int there, int lane) {
  constexpr int rounds = Team::rows_of_warp * Team::chunks / warp_size;
#pragma unroll(whole ? rounds : 1)
  for (int round = 0; round < rounds; ++round) {
    const int i = round * warp_size + lane, r = i / Team::chunks, c = i % Team::chunks;
    const int count = r < there ? head_size - c * per_load<bf16> : 0;
    const uint4* chunk = from + place_of<Team::chunks>(r, c);
    unsigned char* to = static_cast<unsigned char*>(out) + columns.chunk(first + r, c);
    if constexpr (whole) {
      if (count > 0) *reinterpret_cast<uint4*>(to) = *chunk;
    } else {
      for (int j = 0; j < min(count, per_load<bf16>); ++j)
        reinterpret_cast<bf16*>(to)[j] = reinterpret_cast<const bf16*>(chunk)[j];
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
  const int before = warp * Team::rows_of_warp;  // rows of the warps before
  // Each warp's queries, later its results; then two stages of a tile's keys and values.
  uint4* shared = reinterpret_cast<uint4*>(shared_memory) + team * Team::shared;
  uint4* own = shared + before * Team::chunks;
  uint4* stages = shared + Team::rows * Team::chunks;
  const auto place = [](int r, int c) { return place_of<Team::chunks>(r, c); };
  const auto copy_keys = [&](int first, uint4* to) {
    if (first < keys) {
      const auto copy = [&](const void* matrix, int64_t stride, uint4* to) {
        copy_rows<bf16, whole, Team::keys, Team::chunks, Team::threads>(
            matrix, columns_of<bf16>(column, stride), a.head_size, keys - first,
            [&](int r) { return view.row_of_key(first + r); }, to, place, thread);
      };
      copy(a.key, a.key_stride, to);
      copy(a.value, a.value_stride, to + Team::stage);
    }
    ptx::end_copy_group();
  };

  copy_rows<bf16, whole, Team::rows_of_warp, Team::chunks, warp_size>(
      a.query, columns_of<bf16>(column, a.query_stride), a.head_size, view.rows - before,
      [&](int r) { return view.first + before + r; }, own, place, lane);
  ptx::end_copy_group();
  copy_keys(0, stages);
  copy_keys(Team::keys, stages + 2 * Team::stage);

  Rows<Team> rows = {};
  ptx::wait_for_copies<2>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Team::blocks; ++i) {
#pragma unroll
    for (int k = 0; k < Team::head / 16; ++k) {
      const uint4* from = own + place(lane % 16, 2 * k + lane / 16);
      ptx::load_matrices(rows.query[i][k], from + i * 16 * Team::chunks);
    }
  }

  const float factor = a.scale * log2_of_e;
  // Keys that the first of the warp's rows sees, and the last; none, where it has no rows.
  const int seen_first = view.seen + before * view.growth;
  const int seen_last =
      before < view.rows ? seen_first + (Team::rows_of_warp - 1) * view.growth : 0;
  int stage = 0;
  for (int first = 0; first < keys; first += Team::keys) {
    ptx::wait_for_copies<1>();
    wait_for_team<Team::warps>();
    if (first < seen_last) {
      Scores<Team> scores = {};
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
  store<Team, whole>(own, a.out, columns_of<bf16>(column, a.out_stride), a.head_size,
                     view.first + before, view.rows - before, lane);
}

}  // namespace blip_trace::cuda::in_bf16
