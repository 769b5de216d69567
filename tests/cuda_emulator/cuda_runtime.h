// What the kernels use of CUDA, on the CPU, so that the same sources are compiled by a C++ compiler
// and run without a GPU. It stands in for CUDA's header of this name. Blocks run one after the
// other; a block's threads take turns, each runs until it has to wait for others.
//
// A kernel that waits too little depends on who runs first: `set_order` changes that. A barrier
// that not all threads reach ends the process with a sentence.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

// Kernels load and store other types through these.
struct __attribute__((aligned(8), may_alias)) uint2 {
  unsigned x, y;
};

struct __attribute__((aligned(16), may_alias)) uint4 {
  unsigned x, y, z, w;
};

struct __attribute__((aligned(16), may_alias)) float4 {
  float x, y, z, w;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}

// Launches hand their error back; nothing is remembered.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulator {

constexpr int warp_size = 32;

// Whose turn it is among blocks, and among threads that could run: 0 forward, 1 backward, and any
// other number is the seed of a shuffle.
void set_order(int order);

// Ends the process; the thread that runs is named.
[[noreturn]] void fail(const char* sentence);

cudaError_t allow_shared_memory(const void* kernel, int bytes);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread);

void meet_block();

// `all` holds `bytes` of every thread of the warp, once all have come to `where`.
void meet_warp(const void* mine, std::size_t bytes, void* all, const char* where);

int lane();

// What every thread of the warp hands in.
template <class T>
std::array<T, warp_size> all_of_warp(const T& mine, const char* where = "all_of_warp") {
  static_assert(std::is_trivially_copyable_v<T>);
  std::array<T, warp_size> all;
  meet_warp(&mine, sizeof(T), all.data(), where);
  return all;
}

// cp.async: `bytes` arrive, and zeros behind them up to `filled`, but not before they are waited
// for. Committed copies form a group; a wait leaves the last `open` groups to a later one.
void copy_later(void* to, const void* from, std::size_t bytes, std::size_t filled);
void commit_copies();
void wait_for_copies(std::size_t open);

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("a part of a warp is named by a mask; only whole warps can be.");
}

}  // namespace emulator

template <class Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute, int bytes) {
  return emulator::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  return emulator::launch(*config, reinterpret_cast<const void*>(kernel),
                          [&] { std::apply(kernel, values); });
}

inline void __syncthreads() { emulator::meet_block(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::check_mask(mask);
  emulator::all_of_warp('\0', "__syncwarp");
}

template <class T>
T __shfl_sync(unsigned mask, T mine, int lane) {
  emulator::check_mask(mask);
  return emulator::all_of_warp(mine, "__shfl_sync")[lane % emulator::warp_size];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T mine, int other) {
  emulator::check_mask(mask);
  return emulator::all_of_warp(mine, "__shfl_xor_sync")[emulator::lane() ^ other];
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

// Byte i of the result is byte `selector` >> 4 i of a and b, a's are the lower four.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
