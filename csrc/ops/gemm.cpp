#include "gemm.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <atomic>

namespace blip_trace::ops {
namespace {

constexpr int not_forced = -1;
std::atomic<int> forced{not_forced};

std::optional<Way> forced_way() {
  const int way = forced.load(std::memory_order_relaxed);
  return way == not_forced ? std::nullopt : std::optional<Way>(static_cast<Way>(way));
}

bool has_bf16_products() { return cpu::kernels().linear<bf16, bf16, bf16>().linear != nullptr; }

Tensor widened(const Tensor& x) {
  Tensor wide = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  at::parallel_for(0, x.numel(), grain(1), [&](std::int64_t begin, std::int64_t end) {
    cpu::kernels().widen(const_data<bf16>(x) + begin, data<float>(wide) + begin, end - begin);
  });
  return wide;
}

template <class X, class W, class Out>
void linear_blocks(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu,
                   Tensor& out) {
  const cpu::Linear<X, W, Out> args{const_data<X>(x),    x.size(1),      const_data<W>(weight),
                                    const_data<W>(bias), data<Out>(out), weight.size(0),
                                    gelu};
  const std::int64_t rows = x.size(0);
  const cpu::Kernels& kernels = cpu::kernels();
  // Blocks of columns; and of rows too, which packs a part of the weight twice, where columns are
  // too few.
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
      kernels.linear<X, W, Out>().linear(args, row, std::min(row + height, rows), col,
                                         std::min(col + kernels.linear_columns, args.cols), memory);
    }
  });
}

}  // namespace

Way float32_way() {
  const Way usual = cpu::is_amd() ? Way::own : Way::torch;
  const Way way = forced_way().value_or(usual);
  return way == Way::torch ? Way::torch : Way::own;
}

Way bfloat16_way() {
  // Asked once: a virtual machine answers cpuid through its host, which takes as long as a product.
  static const Way usual = cpu::has_amx_bf16() ? Way::torch : Way::own;
  const Way way = forced_way().value_or(usual);
  return way == Way::own && !has_bf16_products() ? Way::widened : way;
}

void force_way(std::optional<std::string> name) {
  int way = not_forced;
  if (name) {
    for (const Way candidate : {Way::torch, Way::own, Way::widened}) {
      if (*name == name_of(candidate)) way = static_cast<int>(candidate);
    }
    TORCH_CHECK_VALUE(way != not_forced, "no way of taking products is called '", *name, "'");
  }
  forced.store(way);
}

const char* name_of(Way way) {
  switch (way) {
    case Way::torch:
      return "torch";
    case Way::own:
      return "own";
    case Way::widened:
      return "widened";
  }
  return "";
}

Way way_of(const Tensor& x) {
  if (x.scalar_type() == at::kFloat) return float32_way();
  const Way way = bfloat16_way();
  return way == Way::own && x.size(1) % 2 != 0 ? Way::widened : way;
}

void linear_into(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu,
                 Tensor& out) {
  if (out.numel() == 0) return;
  if (x.scalar_type() == at::kFloat) {
    linear_blocks<float, float, float>(x, weight, bias, gelu, out);
    return;
  }
  with_type(out, [&](auto element) {
    using Out = decltype(element);
    if (way_of(x) == Way::own) {
      linear_blocks<bf16, bf16, Out>(x, weight, bias, gelu, out);
    } else {
      linear_blocks<float, bf16, Out>(widened(x), weight, bias, gelu, out);
    }
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (way_of(x) == Way::torch) {
    return bias ? at::addmm(*bias, x, weight.t()) : at::mm(x, weight.t());
  }
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  linear_into(x, weight, bias, false, out);
  return out;
}

Tensor product(const Tensor& x, const Tensor& weight) {
  if (way_of(x) == Way::torch) return at::mm(x, weight.t());
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options().dtype(at::kFloat));
  linear_into(x, weight, std::nullopt, false, out);
  return out;
}

Tensor product(const Tensor& x, const Tensor& weight, OptionalTensor& bias) {
  if (!bias || x.scalar_type() == at::kFloat || way_of(x) != Way::torch) return product(x, weight);
  Tensor out = at::addmm(*bias, x, weight.t());
  bias.reset();
  return out;
}

}  // namespace blip_trace::ops
