// Matrix products: of torch's BLAS or of the kernels.
#pragma once

#include "common.h"
#include "products.h"

namespace blip_trace::ops {

// How the products of `x` [rows, K] are taken.
Way way_of(const Tensor& x);

// By the kernels, where `way_of` does not say torch: `out` [rows, M], of the inputs' type or
// float32, = x times weight [M, K] transposed, plus bias, through GELU.
void linear_into(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu,
                 Tensor& out);

// x [rows, K] times weight [M, K] transposed, plus bias [M], in the inputs' type.
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

// x [rows, K] times weight [M, K] transposed. The result is float32, still unrounded, or, of
// bfloat16 taken by torch, bfloat16.
Tensor product(const Tensor& x, const Tensor& weight);

// The same with `bias` [M] for the caller to add, unless the result is already rounded to bfloat16:
// then it is added before the rounding, and taken out of `bias`.
Tensor product(const Tensor& x, const Tensor& weight, OptionalTensor& bias);

// Calls f(In, Out) with the element types of a product and of what its op returns.
template <class F>
void with_types(const Tensor& product, const Tensor& out, F f) {
  if (out.scalar_type() == at::kFloat) {
    f(float{}, float{});
  } else if (product.scalar_type() == at::kFloat) {
    f(float{}, bf16{});
  } else {
    f(bf16{}, bf16{});
  }
}

// Threads for a pass over rows that costs about `cost` operations an element.
template <class F>
void for_rows(std::int64_t rows, std::int64_t cols, std::int64_t cost, F f) {
  at::parallel_for(0, rows, grain(cols * cost), f);
}

}  // namespace blip_trace::ops
