// The ops on CUDA tensors: arguments checked, matrix products by cuBLAS through torch, and between
// them the kernels. The values of row numbers are not checked: that would wait for the device.
#pragma once

#include <tuple>

#include "../ops/checks.h"
#include "kernels.h"

namespace blip_trace::cuda {

using at::Tensor;
using ops::OptionalTensor;

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

Tensor linear_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias);

std::tuple<Tensor, Tensor> linear_add_norm(const Tensor& x, const Tensor& weight,
                                           const OptionalTensor& bias, const Tensor& residual,
                                           const OptionalTensor& residual_rows,
                                           const OptionalTensor& update_rows,
                                           const Tensor& norm_weight, const Tensor& norm_bias,
                                           double eps, bool return_sum);

Tensor self_attention(const Tensor& qkv, const Tensor& starts, const OptionalTensor& prefixes,
                      std::int64_t heads, bool causal);

Tensor cross_attention(const Tensor& query, const Tensor& states, const Tensor& key_weight,
                       const Tensor& value_weight, const Tensor& query_starts,
                       const Tensor& state_starts, std::int64_t heads);

std::tuple<Tensor, Tensor> token_logits(const Tensor& hidden, const Tensor& weight,
                                        const Tensor& bias, const Tensor& tokens);

// What the platform has: CUDA's in library.cpp, the emulator's in tests/cuda_emulator.

// The stream on which torch works for the device of `x`.
Stream current_stream(const Tensor& x);

// x [rows, K] times weight [M, K] transposed, unrounded: float32 whatever the inputs' type.
Tensor wide_product(const Tensor& x, const Tensor& weight);

}  // namespace blip_trace::cuda
