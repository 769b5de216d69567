// add_norm: rows gathered, added and normalized in one pass. The sums of a row stay in registers
// between the mean, the squares of the differences to it, and the result, so that each element is
// read once.
#include "device.cuh"

namespace blip_trace::cuda {
namespace {

constexpr int block = 128, warps_of_block = block / warp_size;

template <class T, int count>
__device__ __forceinline__ void add(const Packed<T, count>& packed, float (&to)[count]) {
  float x[count];
  widen<T>(packed, x);
#pragma unroll
  for (int i = 0; i < count; ++i) to[i] += x[i];
}

// Where a row's summands begin.
template <class T>
struct Row {
  const T *update, *bias, *residual;

  __device__ __forceinline__ Row(const AddNorm& a, int64_t row)
      : update(of(a.update, a.update_rows, row, a.cols)),
        bias(static_cast<const T*>(a.bias)),
        residual(of(a.residual, a.residual_rows, row, a.cols)) {}

  __device__ __forceinline__ static const T* of(const void* matrix, const int32_t* rows,
                                                int64_t row, int64_t cols) {
    return static_cast<const T*>(matrix) + (rows == nullptr ? row : rows[row]) * cols;
  }

  template <int count>
  __device__ __forceinline__ void load_total(int64_t column, float (&total)[count]) const {
    load(update + column, total);
    if (bias != nullptr) add<T>(load_packed<count>(bias + column), total);
    add<T>(load_packed<count>(residual + column), total);
  }
};

template <int count>
__device__ __forceinline__ float sum_of(const float (&x)[count]) {
  float sum = x[0];
#pragma unroll
  for (int i = 1; i < count; ++i) sum += x[i];
  return sum;
}

template <int count>
__device__ __forceinline__ float squares_of(const float (&x)[count], float mean) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < count; ++i) sum += (x[i] - mean) * (x[i] - mean);
  return sum;
}

template <class T, int count>
__device__ __forceinline__ void normalize(const Packed<T, count>& weight,
                                          const Packed<T, count>& bias, float mean, float scale,
                                          float (&x)[count]) {
  float factor[count];
  widen<T>(weight, factor);
#pragma unroll
  for (int i = 0; i < count; ++i) x[i] = (x[i] - mean) * scale * factor[i];
  add<T>(bias, x);
}

// `values` elements of a row, a multiple of a load's, for each thread of a team. All that is read
// is asked for before the first of it is used.
template <class T, int values, int warps>
__global__ void __launch_bounds__(block) add_norm_in_registers(const AddNorm a) {
  constexpr int count = per_load<T>, loads = values / count, team = warps * warp_size;
  const int64_t row = int64_t{blockIdx.x} * (block / team) + threadIdx.x / team;
  if (row >= a.rows) return;
  const int cols = static_cast<int>(a.cols);
  const auto column = [&](int i) {
    return (i * team + static_cast<int>(threadIdx.x) % team) * count;
  };
  const auto load_all = [&](const T* from, Packed<T, count>(&to)[loads]) {
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      if (column(i) < cols) to[i] = load_packed<count>(from + column(i));
    }
  };

  const Row<T> from(a, row);
  Packed<T, count> update[loads] = {}, residual[loads] = {};
  load_all(from.update, update);
  load_all(from.residual, residual);
  float total[loads][count];
#pragma unroll
  for (int i = 0; i < loads; ++i) widen<T>(update[i], total[i]);
  if (from.bias != nullptr) {
    Packed<T, count> bias[loads] = {};
    load_all(from.bias, bias);
#pragma unroll
    for (int i = 0; i < loads; ++i) add<T>(bias[i], total[i]);
  }
#pragma unroll
  for (int i = 0; i < loads; ++i) add<T>(residual[i], total[i]);
  Packed<T, count> weight[loads] = {}, bias[loads] = {};
  load_all(static_cast<const T*>(a.norm_weight), weight);
  load_all(static_cast<const T*>(a.norm_bias), bias);

  float sum = 0.0f;  // what is behind the row's end is zero
#pragma unroll
  for (int i = 0; i < loads; ++i) sum += sum_of(total[i]);
  const float mean = team_sum<warps>(sum) / cols;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < loads; ++i) squares += column(i) < cols ? squares_of(total[i], mean) : 0.0f;
  const float scale = rsqrtf(team_sum<warps>(squares) / cols + a.eps);

  if (a.sum != nullptr) {
#pragma unroll
    for (int i = 0; i < loads; ++i) {
      if (column(i) < cols) store(static_cast<T*>(a.sum) + row * a.cols + column(i), total[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < loads; ++i) {
    normalize<T>(weight[i], bias[i], mean, scale, total[i]);
    if (column(i) < cols) store(static_cast<T*>(a.normed) + row * a.cols + column(i), total[i]);
  }
}

// Any width: a block reads its row three times.
template <class T, int count>
__global__ void __launch_bounds__(block) add_norm_of_any_width(const AddNorm a) {
  const int64_t row = blockIdx.x;
  const Row<T> from(a, row);
  const int64_t first = threadIdx.x * count;
  constexpr int step = block * count;
  float total[count];

  float sum = 0.0f;
  for (int64_t column = first; column < a.cols; column += step) {
    from.load_total(column, total);
    sum += sum_of(total);
  }
  const float cols = static_cast<float>(a.cols), mean = team_sum<warps_of_block>(sum) / cols;
  float squares = 0.0f;
  for (int64_t column = first; column < a.cols; column += step) {
    from.load_total(column, total);
    squares += squares_of(total, mean);
  }
  const float scale = rsqrtf(team_sum<warps_of_block>(squares) / cols + a.eps);
  for (int64_t column = first; column < a.cols; column += step) {
    from.load_total(column, total);
    if (a.sum != nullptr) store(static_cast<T*>(a.sum) + row * a.cols + column, total);
    normalize<T>(load_packed<count>(static_cast<const T*>(a.norm_weight) + column),
                 load_packed<count>(static_cast<const T*>(a.norm_bias) + column), mean, scale,
                 total);
    store(static_cast<T*>(a.normed) + row * a.cols + column, total);
  }
}

template <class T, int values, int warps>
const char* in_registers(const AddNorm& a, Stream stream) {
  return launch(add_norm_in_registers<T, values, warps>, ceil_div(a.rows, warps_of_block / warps),
                block, warps_of_block * sizeof(float), stream, a);
}

template <class T, int count>
const char* of_any_width(const AddNorm& a, Stream stream) {
  return launch(add_norm_of_any_width<T, count>, a.rows, block, warps_of_block * sizeof(float),
                stream, a);
}

template <class T>
const char* run(const AddNorm& a, Stream stream) {
  const void* const pointers[] = {a.update,      a.bias,      a.residual, a.norm_weight,
                                  a.norm_bias,   a.normed,    a.sum};
  bool aligned = a.cols % per_load<T> == 0;
  for (const void* pointer : pointers) aligned = aligned && is_aligned(pointer);
  if (!aligned) return of_any_width<T, 1>(a, stream);
  if (a.cols <= 8 * warp_size) return in_registers<T, 8, 1>(a, stream);
  if (a.cols <= 16 * warp_size) return in_registers<T, 16, 1>(a, stream);
  if (a.cols <= 24 * warp_size) return in_registers<T, 24, 1>(a, stream);
  if (a.cols <= 32 * warp_size) return in_registers<T, 32, 1>(a, stream);
  if (a.cols <= 16 * block) return in_registers<T, 16, warps_of_block>(a, stream);
  if (a.cols <= 32 * block) return in_registers<T, 32, warps_of_block>(a, stream);
  return of_any_width<T, per_load<T>>(a, stream);
}

}  // namespace

const char* add_norm(const AddNorm& a, Stream stream) {
  if (a.rows == 0 || a.cols == 0) return nullptr;
  return with_type(a.type, [&](auto element) { return run<decltype(element)>(a, stream); });
}

}  // namespace blip_trace::cuda
