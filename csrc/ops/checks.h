// Argument checks that every backend's bindings share: they look at types, devices and sizes, never
// at values.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace blip_trace::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

inline OptionalTensor contiguous(const OptionalTensor& x) {
  return x ? OptionalTensor(x->contiguous()) : std::nullopt;
}

// Refuses all but float32 and bfloat16 matrices.
void check_matrix(const char* op, const char* name, const Tensor& x);

// `x` is like `like` in type and device, and has the sizes given.
void check_like(const char* op, const char* name, const Tensor& x, const Tensor& like,
                at::IntArrayRef sizes);

// `rows` is a vector of row numbers (int32), on the device of `like`.
void check_row_numbers(const char* op, const char* name, const Tensor& rows, const Tensor& like);

// `starts` is a vector of int32 that marks parts, on the device of `like`; returns their number.
std::int64_t check_marks(const char* op, const char* name, const Tensor& starts, const Tensor& like);

// `prefixes` has a first row and a number of rows (int32) for each run.
void check_prefix_sizes(const Tensor& prefixes, std::int64_t runs, const Tensor& like);

// `tokens` has row for row the tokens (int64) whose logits are asked for.
void check_token_sizes(const Tensor& tokens, std::int64_t rows, const Tensor& like);

// linear_add_norm: all of its arguments. Returns the number of rows that go on.
std::int64_t check_add_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const Tensor& residual, const OptionalTensor& residual_rows,
                            const OptionalTensor& update_rows, const Tensor& norm_weight,
                            const Tensor& norm_bias);

// self_attention: all but the values of its marks. Returns the number of runs.
std::int64_t check_self_attention(const Tensor& qkv, const Tensor& starts,
                                  const OptionalTensor& prefixes, std::int64_t heads);

// cross_attention: likewise. Returns the number of groups.
std::int64_t check_cross_attention(const Tensor& query, const Tensor& states,
                                   const Tensor& key_weight, const Tensor& value_weight,
                                   const Tensor& query_starts, const Tensor& state_starts,
                                   std::int64_t heads);

// x [rows, K], weight [M, K] and bias [M].
void check_layer(const char* op, const char* name, const Tensor& x, const Tensor& weight,
                 const OptionalTensor& bias);

}  // namespace blip_trace::ops
