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

// Upcast weights never take more memory than this at once.
constexpr std::int64_t panel_bytes = 8 << 20;

void widen(const Tensor& from, std::int64_t first, std::int64_t rows, Tensor& to) {
  const std::int64_t cols = from.size(1);
  const bf16* source = const_data<bf16>(from) + first * cols;
  float* target = data<float>(to);
  at::parallel_for(0, rows, grain(cols), [&](std::int64_t begin, std::int64_t end) {
    cpu::kernels().pack_bf16.widen(source + begin * cols, target + begin * cols, (end - begin) * cols);
  });
}

}  // namespace

bool native_bf16_products() { return native_bf16().load(std::memory_order_relaxed); }

void set_native_bf16_products(std::optional<bool> native) {
  native_bf16().store(native.value_or(cpu::has_bf16_products()));
}

Tensor to_float(const Tensor& x) {
  if (x.scalar_type() == at::kFloat) return x;
  Tensor wide = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  widen(x, 0, x.size(0), wide);
  return wide;
}

Tensor product(const Tensor& x, const Tensor& weight) {
  if (x.scalar_type() == at::kFloat || native_bf16_products()) return at::mm(x, weight.t());
  const std::int64_t rows = weight.size(0), depth = weight.size(1);
  const Tensor wide = to_float(x);
  Tensor out = at::empty({x.size(0), rows}, wide.options());
  const std::int64_t step =
      std::clamp<std::int64_t>(panel_bytes / std::max<std::int64_t>(1, 4 * depth), 1, std::max<std::int64_t>(1, rows));
  Tensor panel = at::empty({step, depth}, wide.options());
  for (std::int64_t first = 0; first < rows; first += step) {
    const std::int64_t count = std::min(step, rows - first);
    widen(weight, first, count, panel);
    Tensor part = out.narrow(1, first, count);
    at::mm_out(part, wide, panel.narrow(0, 0, count).t());
  }
  return out;
}

Tensor product(const Tensor& x, const Tensor& weight, OptionalTensor& bias) {
  if (!bias || x.scalar_type() == at::kFloat || !native_bf16_products()) return product(x, weight);
  Tensor out = at::addmm(*bias, x, weight.t());
  bias.reset();
  return out;
}

}  // namespace blip_trace::ops
