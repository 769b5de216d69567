// What the attention kernels of both types share: which rows and keys a team of threads works on,
// how these come into shared memory, and a row's softmax.
#pragma once

#include <tensor_cores.cuh>

#include "device.cuh"

namespace blip_trace::cuda {

// Query rows of one group, at most those of a team, and the keys that they see. Keys are counted
// from the first of the prefix.
struct View {
  int head;
  int first, rows;          // query rows: the first, and how many
  int prefix_rows;          // keys of the prefix
  int prefix_key, own_key;  // key j is row prefix_key + j, from prefix_rows on row own_key + j
  int seen, growth;         // query i of these sees the first seen + i * growth keys

  __device__ __forceinline__ int keys() const { return seen + (rows - 1) * growth; }
  __device__ __forceinline__ int row_of_key(int j) const {
    return (j < prefix_rows ? prefix_key : own_key) + j;
  }
};

// The group that owns a tile, tiles numbered as tiles() of device.cuh says. A whole warp searches:
// each round leaves a thirty-second of the groups, where one thread would leave half.
template <int rows>
__device__ __forceinline__ int group_of_tile(const int32_t* starts, int groups, int tile) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  int low = 0;
  for (int left = groups; left > 1;) {
    left = (left + warp_size - 1) / warp_size;
    const int probe = low + lane * left;
    if (probe < groups && starts[probe] / rows + probe <= tile) low = probe;
#pragma unroll
    for (int other = 1; other < warp_size; other *= 2)
      low = max(low, __shfl_xor_sync(whole_warp, low, other));
  }
  return low;
}

// What a team works on: a tile of `rows` queries, and a head. They are numbered heads first, so
// that teams side by side read rows that lie side by side. Returns whether there is anything.
template <int rows>
__device__ __forceinline__ bool find_view(const Attention& a, int number, View& view) {
  const int tile = number / a.heads;
  const int group = group_of_tile<rows>(a.query_starts, static_cast<int>(a.groups), tile);
  const int begin = a.query_starts[group], end = a.query_starts[group + 1];
  const int before = (tile - group - begin / rows) * rows;
  if (before >= end - begin) return false;
  const int first_key = a.key_starts[group];
  view.head = number - tile * a.heads;
  view.first = begin + before;
  view.rows = min(end - begin - before, rows);
  view.prefix_key = a.prefixes == nullptr ? 0 : a.prefixes[2 * group];
  view.prefix_rows = a.prefixes == nullptr ? 0 : a.prefixes[2 * group + 1];
  view.own_key = first_key - view.prefix_rows;
  view.seen = view.prefix_rows + (a.causal ? before + 1 : a.key_starts[group + 1] - first_key);
  view.growth = a.causal ? 1 : 0;
  return true;
}

// Everything is copied in chunks of 16 bytes. Whether rows and heads begin at multiples of 16 bytes
// and heads are whole chunks; if not, elements are copied one by one.
template <class T>
bool in_whole_chunks(const Attention& a) {
  return is_aligned(a.query) && is_aligned(a.key) && is_aligned(a.value) && is_aligned(a.out) &&
         (a.query_stride | a.key_stride | a.value_stride | a.out_stride | a.head_size) %
                 per_load<T> == 0;
}

// Where a head's columns of a matrix lie. In bytes, and unsigned: so a place takes one product.
struct Columns {
  unsigned first, stride;

  __device__ __forceinline__ std::uint64_t chunk(int row, int c) const {
    return std::uint64_t{static_cast<unsigned>(row)} * stride + (first + c * 16);
  }
};

template <class T>
__device__ __forceinline__ Columns columns_of(int first, int64_t stride) {
  return {static_cast<unsigned>(first * sizeof(T)), static_cast<unsigned>(stride * sizeof(T))};
}

// Begins to fill a chunk of shared memory with `count` elements and zeros behind them. No elements
// or all, where `count` is less or more than is possible; `from` is not read where there are none.
template <class T, bool whole>
__device__ __forceinline__ void copy_chunk(uint4* to, const void* from, int count) {
  if constexpr (whole) {
    ptx::copy_16(to, from, count > 0);
  } else {
    T* elements = reinterpret_cast<T*>(to);
    for (int i = 0; i < per_load<T>; ++i)
      elements[i] = i < count ? static_cast<const T*>(from)[i] : T{};
  }
}

// Begins to copy a head's columns of `rows` rows, with `threads` threads of which this is `thread`;
// rows from `there` on become zeros. row_of(r) is the number of row r, whose chunk c comes to
// to[place(r, c)].
template <class T, bool whole, int rows, int chunks, int threads, class RowOf, class Place>
__device__ __forceinline__ void copy_rows(const void* matrix, Columns columns, int head_size,
                                          int there, RowOf row_of, uint4* to, Place place,
                                          int thread) {
  constexpr int rounds = rows * chunks / threads;
  static_assert(rows * chunks % threads == 0);
#pragma unroll(whole ? rounds : 1)
  for (int round = 0; round < rounds; ++round) {
    const int i = round * threads + thread, r = i / chunks, c = i % chunks;
    copy_chunk<T, whole>(to + place(r, c),
                         static_cast<const unsigned char*>(matrix) + columns.chunk(row_of(r), c),
                         r < there ? head_size - c * per_load<T> : 0);
  }
}

// All threads of a team wait for each other: a warp, or a whole block.
template <int warps>
__device__ __forceinline__ void wait_for_team() {
  if constexpr (warps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Over the `lanes` neighboring lanes that share a row. A maximum passes over NaN.
template <int lanes>
__device__ __forceinline__ float maximum_of_row(float x) {
#pragma unroll
  for (int other = 1; other < lanes; other *= 2)
    x = fmaxf(x, __shfl_xor_sync(whole_warp, x, other));
  return x;
}

template <int lanes>
__device__ __forceinline__ float sum_of_row(float x) {
#pragma unroll
  for (int other = 1; other < lanes; other *= 2) x += __shfl_xor_sync(whole_warp, x, other);
  return x;
}

// A row's softmax as far as its keys have been seen. A score's weight is 2^(factor * score - top);
// the factor is positive.
struct Softmax {
  float top = -INFINITY;  // the largest factor * score
  float sum = 0.0f;       // of this thread's weights

  // Takes in the largest of new scores. Returns what the old weights are to be multiplied by. `top`
  // as it is to be taken from exponents is in `shift`: zero in place of -infinity, which, less
  // itself, would be NaN.
  __device__ __forceinline__ float raise(float largest, float factor, float& shift) {
    const float raised = fmaxf(top, largest * factor);
    shift = raised == -INFINITY ? 0.0f : raised;
    const float keep = ptx::exp2_of(top - shift);
    top = raised;
    sum *= keep;
    return keep;
  }

  __device__ __forceinline__ float weigh(float score, float factor, float shift) {
    const float weight = ptx::exp2_of(score * factor - shift);
    sum += weight;
    return weight;
  }
};

}  // namespace blip_trace::cuda
