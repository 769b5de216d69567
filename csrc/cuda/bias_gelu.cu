// bias_gelu: in place, 16 bytes of a few rows for each thread, which reads their bias once.
#include <tensor_cores.cuh>

#include "device.cuh"

namespace blip_trace::cuda {
namespace {

constexpr int rows_of_thread = 4, largest_block = 128;

// x Phi(x), Phi the normal distribution function: max(x, 0) - a 2^p(a) with a = |x|, where p is
// log2(Phi(-a)), the weighted least maximum (Lawson's iteration, for the error of the product, a up
// to 5.5): absolute error 1e-9 before rounding, relative error below 1e-5 as long as it is larger
// than 1e-6. Half the instructions of erff, which would take longer than the memory does. Further
// out p falls on; a is held long after the product has vanished, so that infinity gives 0 too, by a
// comparison that passes NaN on.
__device__ __forceinline__ float gelu(float x) {
  const float a = fabsf(x) > 14.0f ? 14.0f : fabsf(x);
  float p = a * -3.6125602e-08f + 1.0076753e-06f;
  p = p * a - 1.217577e-05f;
  p = p * a + 8.13769e-05f;
  p = p * a - 0.00028985064f;
  p = p * a + 8.447426e-06f;
  p = p * a + 0.0069503407f;
  p = p * a - 0.052451905f;
  p = p * a - 0.45921475f;
  p = p * a - 1.1511053f;
  p = p * a - 1.0f;
  return fmaxf(x, 0.0f) - a * ptx::exp2_of(p);
}

template <class T, int count>
__global__ void __launch_bounds__(largest_block) bias_gelu_kernel(const BiasGelu args) {
  const int64_t column = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * count;
  if (column >= args.cols) return;
  float bias[count];
  load(static_cast<const T*>(args.bias) + column, bias);
  const int64_t first = int64_t{blockIdx.x} * rows_of_thread;
  T* const at = static_cast<T*>(args.x) + first * args.cols + column;
  const int64_t rows = args.rows - first;

  float x[rows_of_thread][count];
#pragma unroll
  for (int i = 0; i < rows_of_thread; ++i) {
    if (i < rows) load(at + i * args.cols, x[i]);
  }
#pragma unroll
  for (int i = 0; i < rows_of_thread; ++i) {
    if (i >= rows) return;
#pragma unroll
    for (int j = 0; j < count; ++j) x[i][j] = gelu(x[i][j] + bias[j]);
    store(at + i * args.cols, x[i]);
  }
}

template <class T, int count>
const char* run(const BiasGelu& a, Stream stream) {
  const int64_t loads = a.cols / count, warps = ceil_div(loads, warp_size);
  const int64_t block = warps * warp_size < largest_block ? warps * warp_size : largest_block;
  return launch(bias_gelu_kernel<T, count>,
                dim3(ceil_div(a.rows, rows_of_thread), ceil_div(loads, block)), block, 0, stream,
                a);
}

}  // namespace

const char* bias_gelu(const BiasGelu& a, Stream stream) {
  if (a.rows == 0 || a.cols == 0) return nullptr;
  return with_type(a.type, [&](auto element) {
    using T = decltype(element);
    const bool aligned = a.cols % per_load<T> == 0 && is_aligned(a.bias) && is_aligned(a.x);
    return aligned ? run<T, per_load<T>>(a, stream) : run<T, 1>(a, stream);
  });
}

}  // namespace blip_trace::cuda
