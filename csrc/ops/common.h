// What the bindings share: argument checks, threads and scratch memory.
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

namespace blip_trace::ops {

using at::Tensor;
using cpu::bf16;
using OptionalTensor = std::optional<Tensor>;

// Calls f with a value of the element type of `x`, float or bf16.
template <class F>
decltype(auto) with_type(const Tensor& x, F f) {
  return x.scalar_type() == at::kFloat ? f(float{}) : f(bf16{});
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
const T* const_data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* const_data(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// Refuses all but float32 and bfloat16 matrices.
void check_matrix(const char* op, const char* name, const Tensor& x);

// `x` is like `like` in type and device, and has the sizes given.
void check_like(const char* op, const char* name, const Tensor& x, const Tensor& like,
                at::IntArrayRef sizes);

// `rows` is a vector of int32 row numbers below `limit`.
void check_rows(const char* op, const char* name, const Tensor& rows, std::int64_t limit);

// `starts` is a vector of int32 that rises from 0 to `total`; returns the number of parts.
std::int64_t check_starts(const char* op, const char* name, const Tensor& starts,
                          std::int64_t total);

inline std::optional<Tensor> contiguous(const OptionalTensor& x) {
  return x ? std::optional<Tensor>(x->contiguous()) : std::nullopt;
}

// How many items of so much work (in floating-point operations) are worth a thread of their own.
inline std::int64_t grain(std::int64_t work_per_item) {
  constexpr std::int64_t work_per_thread = 400'000;
  return std::max<std::int64_t>(1, work_per_thread / std::max<std::int64_t>(1, work_per_item));
}

// This thread's scratch memory, aligned to cache lines; the next call may move it.
float* scratch(std::int64_t floats);

}  // namespace blip_trace::ops
