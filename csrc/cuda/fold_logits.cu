// fold_logits: each logit is read once. A thread keeps the maximum of those it has seen and the sum
// of their exponentials relative to it; at the end its team puts those together.
#include <tensor_cores.cuh>

#include "device.cuh"

namespace blip_trace::cuda {
namespace {

constexpr int block = 256, warps_of_block = block / warp_size;
constexpr int logits_at_once = 16;

// What exponentials are taken relative to. Of an infinite maximum the difference to itself would be
// NaN.
__device__ __forceinline__ float base_of(float maximum) {
  return fabsf(maximum) == INFINITY ? 0.0f : maximum;
}

__device__ __forceinline__ float exponential(float x) { return ptx::exp2_of(x * log2_of_e); }

// A sum of exponentials, relative to a maximum that passes over NaN: of a NaN the sum is NaN.
struct Sum {
  float maximum = -INFINITY, sum = 0.0f;

  __device__ __forceinline__ void raise(float next) {
    if (maximum != next) sum *= exponential(maximum - base_of(next));
    maximum = next;
  }

  template <int count>
  __device__ __forceinline__ void add(const float (&x)[count]) {
    float next = maximum;
#pragma unroll
    for (int i = 0; i < count; ++i) next = fmaxf(next, x[i]);
    raise(next);
    const float base = base_of(next);
#pragma unroll
    for (int i = 0; i < count; ++i) sum += exponential(x[i] - base);
  }
};

template <class T, int count, int warps>
__global__ void __launch_bounds__(block) fold_logits_kernel(const FoldLogits a) {
  constexpr int team = warps * warp_size, loads = logits_at_once / count;
  const int64_t row = int64_t{blockIdx.x} * (block / team) + threadIdx.x / team;
  if (row >= a.rows) return;
  const int thread = threadIdx.x % team;
  const float* values = a.values + row * a.words;
  const T* bias = static_cast<const T*>(a.bias) + a.first_word;

  Sum all;
  for (int64_t first = 0; first < a.words; first += team * logits_at_once) {
    float x[loads][count], offsets[loads][count] = {};
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      const int64_t word = first + (i * team + thread) * count;
      if (word < a.words) {
        load(values + word, x[i]);
        load(bias + word, offsets[i]);
      } else {
#pragma unroll
        for (int j = 0; j < count; ++j) x[i][j] = -INFINITY;
      }
    }
    float logits[logits_at_once];
#pragma unroll
    for (int i = 0; i < logits_at_once; ++i)
      logits[i] = x[i / count][i % count] + offsets[i / count][i % count];
    all.add(logits);
  }
  all.raise(team_max<warps>(all.maximum));
  all.sum = team_sum<warps>(all.sum);

  for (int64_t i = row * a.chosen + thread; i < (row + 1) * a.chosen; i += team) {
    const int64_t token = a.tokens[i], word = token - a.first_word;
    if (word >= 0 && word < a.words) a.logits[i] = values[word] + to_float(bias[word]);
    // No word at all: nobody could check that without waiting for the device.
    if (token < 0 || token >= a.vocabulary) a.logits[i] = NAN;
  }
  if (thread != 0) return;
  if (a.first_word > 0) {
    Sum before;
    before.maximum = a.maximum[row];
    before.sum = a.sum[row];
    const float maximum = fmaxf(before.maximum, all.maximum);
    before.raise(maximum);
    all.raise(maximum);
    all.sum += before.sum;
  }
  if (a.first_word + a.words < a.vocabulary) {
    a.maximum[row] = all.maximum;
    a.sum[row] = all.sum;
  } else {
    const bool infinite = fabsf(all.maximum) == INFINITY && all.sum == all.sum;
    const double maximum = all.maximum;
    a.log_sum_exp[row] = infinite ? maximum : maximum + log(static_cast<double>(all.sum));
  }
}

// A warp for each row, unless there are too few of them to fill the GPU.
template <class T, int count>
const char* run(const FoldLogits& a, Stream stream) {
  constexpr int64_t many_rows = 4096;
  constexpr std::size_t shared_bytes = warps_of_block * sizeof(float);
  return a.rows < many_rows
             ? launch(fold_logits_kernel<T, count, warps_of_block>, a.rows, block, shared_bytes,
                      stream, a)
             : launch(fold_logits_kernel<T, count, 1>, ceil_div(a.rows, warps_of_block), block,
                      shared_bytes, stream, a);
}

}  // namespace

const char* fold_logits(const FoldLogits& a, Stream stream) {
  if (a.rows == 0) return nullptr;
  return with_type(a.type, [&](auto element) {
    using T = decltype(element);
    const T* bias = static_cast<const T*>(a.bias) + a.first_word;
    const bool aligned =
        a.words % 4 == 0 && is_aligned(a.values) && is_aligned(bias, 4 * sizeof(T));
    return aligned ? run<T, 4>(a, stream) : run<T, 1>(a, stream);
  });
}

}  // namespace blip_trace::cuda
