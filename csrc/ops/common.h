// What the CPU's bindings share: checks of values, threads and scratch memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "../cpu/capability.h"
#include "checks.h"

namespace blip_trace::ops {

using cpu::bf16;

// Calls f with a value of the element type of `x`, float or bf16.
template <class F>
decltype(auto) with_type(const Tensor& x, F f) {
  return x.scalar_type() == at::kFloat ? f(float{}) : f(bf16{});
}

// `rows` holds row numbers below `limit`.
void check_rows(const char* op, const char* name, const Tensor& rows, std::int64_t limit);

// `starts` rises from 0 to `total`.
void check_starts(const char* op, const char* name, const Tensor& starts, std::int64_t total);

// How many items of so much work (in floating-point operations) are worth a thread of their own.
inline std::int64_t grain(std::int64_t work_per_item) {
  constexpr std::int64_t work_per_thread = 400'000;
  return std::max<std::int64_t>(1, work_per_thread / std::max<std::int64_t>(1, work_per_item));
}

// This thread's scratch memory, aligned to cache lines; the next call may move it.
float* scratch(std::int64_t floats);

}  // namespace blip_trace::ops
