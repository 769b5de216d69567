// What the kernels share: element types, loads of 16 bytes, teams of threads, groups, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace blip_trace::cuda {

using bf16 = __nv_bfloat16;
using std::int32_t;
using std::int64_t;

constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xffffffffu;
constexpr float log2_of_e = 1.44269504f;

// A block's, as much as its launch says.
extern __shared__ __align__(128) unsigned char shared_memory[];

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two elements of bfloat16 in a word, the first in its lower half.
__device__ __forceinline__ void unpack(unsigned word, float& first, float& second) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ unsigned pack(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  unsigned word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

// Elements in 16 bytes, the most that a thread loads at once.
template <class T>
constexpr int per_load = 16 / static_cast<int>(sizeof(T));

// `count` elements as they are in memory: one, or 8 or 16 bytes of them.
template <class T, int count>
using Packed = std::conditional_t<
    count == 1, T, std::conditional_t<count * sizeof(T) == 16, uint4, uint2>>;

// Of an address that the size divides.
template <int count, class T>
__device__ __forceinline__ Packed<T, count> load_packed(const T* from) {
  static_assert(count == 1 || count * sizeof(T) == 8 || count * sizeof(T) == 16);
  return *reinterpret_cast<const Packed<T, count>*>(from);
}

template <class T, int count>
__device__ __forceinline__ void widen(const Packed<T, count>& from, float (&to)[count]) {
  if constexpr (count == 1) {
    to[0] = to_float(from);
  } else if constexpr (sizeof(T) == 4) {
    to[0] = __uint_as_float(from.x);
    to[1] = __uint_as_float(from.y);
    to[2] = __uint_as_float(from.z);
    to[3] = __uint_as_float(from.w);
  } else {
    unpack(from.x, to[0], to[1]);
    unpack(from.y, to[2], to[3]);
    if constexpr (count == 8) {
      unpack(from.z, to[4], to[5]);
      unpack(from.w, to[6], to[7]);
    }
  }
}

template <int count, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[count]) {
  widen<T>(load_packed<count>(from), to);
}

template <int count, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[count]) {
  static_assert(count == 1 || count == per_load<T>);
  if constexpr (count == 1) {
    *to = from_float<T>(from[0]);
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack(from[0], from[1]), pack(from[2], from[3]),
                                               pack(from[4], from[5]), pack(from[6], from[7]));
  }
}

// The sum, or the largest but for NaN, of a value of each thread of the warp; all of them get it.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int other = warp_size / 2; other > 0; other /= 2) x += __shfl_xor_sync(whole_warp, x, other);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int other = warp_size / 2; other > 0; other /= 2)
    x = fmaxf(x, __shfl_xor_sync(whole_warp, x, other));
  return x;
}

// A team are the threads that share a row: a warp, of which a block holds several, or all `warps`
// of a block, which then has one float of shared memory for each of them.
template <int warps, class Combine>
__device__ __forceinline__ float team_all(float x, Combine combine) {
  if constexpr (warps > 1) {
    float* parts = reinterpret_cast<float*>(shared_memory);
    __syncthreads();  // what was combined before has been read
    if (threadIdx.x % warp_size == 0) parts[threadIdx.x / warp_size] = x;
    __syncthreads();
    x = parts[0];
#pragma unroll
    for (int i = 1; i < warps; ++i) x = combine(x, parts[i]);
  }
  return x;
}

template <int warps>
__device__ __forceinline__ float team_sum(float x) {
  return team_all<warps>(warp_sum(x), [](float a, float b) { return a + b; });
}

template <int warps>
__device__ __forceinline__ float team_max(float x) {
  return team_all<warps>(warp_max(x), [](float a, float b) { return fmaxf(a, b); });
}

// The group that owns one of `rows` rows; `starts` [groups + 1].
__device__ __forceinline__ int64_t group_of(const int32_t* starts, int64_t groups, int64_t rows,
                                            int64_t row) {
  // Most often groups are of one size, and then it is this one: a search is a chain of loads.
  const float share = __fdividef(static_cast<float>(groups), static_cast<float>(rows));
  const auto guess = static_cast<int64_t>((static_cast<float>(row) + 0.5f) * share);
  if (guess < groups && starts[guess] <= row && row < starts[guess + 1]) return guess;
  int64_t low = 0, high = groups;  // starts[low] <= row < starts[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= row) low = middle;
    else high = middle;
  }
  return low;
}

// Tiles of up to `rows` rows of one group are numbered so that group g's begin at starts[g] / rows
// + g. There are so many of them, known without the groups' sizes; some are empty.
template <int rows>
constexpr int64_t tiles(int64_t all_rows, int64_t groups) {
  return all_rows / rows + groups;
}

// Null is, too.
inline bool is_aligned(const void* pointer, std::size_t bytes = 16) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with a value of the element type.
template <class F>
const char* with_type(Type type, F f) {
  return type == Type::float32 ? f(float{}) : f(bf16{});
}

// Returns nullptr, or what CUDA says went wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   Stream stream, const Arguments&... arguments) {
  constexpr std::size_t unasked = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > unasked)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is told here; torch would tell it again, of another call
  return cudaGetErrorString(error);
}

}  // namespace blip_trace::cuda
