#include "gemm.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <atomic>

namespace blip_trace::ops {
namespace {

std::atomic<bool>& native_bf16() {
  static std::atomic<bool> native{cpu::has_bf16_products()};
  return native;
}

Tensor widened(const Tensor& x) {
  Tensor wide = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  at::parallel_for(0, x.numel(), grain(1), [&](std::int64_t begin, std::int64_t end) {
    cpu::kernels().widen(const_data<bf16>(x) + begin, data<float>(wide) + begin, end - begin);
  });
  return wide;
}

template <class Out>
void linear_blocks(const cpu::Linear<Out>& args, std::int64_t rows) {
  const cpu::Kernels& kernels = cpu::kernels();
  // Blocks of columns; and of rows too, which converts a part of the weight twice, where columns
  // are too few.
  const std::int64_t threads = at::get_num_threads();
  const std::int64_t across = (args.cols + kernels.linear_columns - 1) / kernels.linear_columns;
  const std::int64_t row_blocks = (rows + kernels.linear_rows - 1) / kernels.linear_rows;
  const std::int64_t wanted = std::clamp<std::int64_t>(2 * threads / across, 1, row_blocks);
  const std::int64_t height = (row_blocks + wanted - 1) / wanted * kernels.linear_rows;
  const std::int64_t parts = (rows + height - 1) / height;
  const std::int64_t work =
      2 * std::min(height, rows) * args.k * std::min(args.cols, kernels.linear_columns);
  at::parallel_for(0, across * parts, grain(work), [&](std::int64_t begin, std::int64_t end) {
    float* memory = scratch(kernels.linear_scratch(std::min(height, rows), args.k));
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = i % parts * height, col = i / parts * kernels.linear_columns;
      kernels.linear<Out>().linear(args, row, std::min(row + height, rows), col,
                                   std::min(col + kernels.linear_columns, args.cols), memory);
    }
  });
}

}  // namespace

bool native_bf16_products() { return native_bf16().load(std::memory_order_relaxed); }

void set_native_bf16_products(std::optional<bool> native) {
  native_bf16().store(native.value_or(cpu::has_bf16_products()));
}

bool through_float(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && !native_bf16_products();
}

void linear_through_float(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          bool gelu, Tensor& out) {
  if (out.numel() == 0) return;
  const Tensor wide = widened(x);
  with_type(out, [&](auto element) {
    using Out = decltype(element);
    linear_blocks<Out>({const_data<float>(wide), x.size(1), const_data<bf16>(weight),
                        const_data<bf16>(bias), data<Out>(out), weight.size(0), gelu},
                       x.size(0));
  });
}

Tensor product(const Tensor& x, const Tensor& weight) {
  if (!through_float(x)) return at::mm(x, weight.t());
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options().dtype(at::kFloat));
  linear_through_float(x, weight, std::nullopt, false, out);
  return out;
}

Tensor product(const Tensor& x, const Tensor& weight, OptionalTensor& bias) {
  if (!bias || x.scalar_type() == at::kFloat || !native_bf16_products()) return product(x, weight);
  Tensor out = at::addmm(*bias, x, weight.t());
  bias.reset();
  return out;
}

}  // namespace blip_trace::ops
