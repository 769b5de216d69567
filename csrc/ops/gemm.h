// Matrix products through torch's BLAS.
#pragma once

#include "bf16.h"
#include "common.h"

namespace blip_trace::ops {

// Whether the products of `x` are bfloat16 ones taken through float32.
bool through_float(const Tensor& x);

// Of such a product: `out` [rows, M], bfloat16 or float32, = x times weight [M, K] transposed, plus
// bias, through GELU. A part of the weight is converted at a time, and used while it is in the
// cache.
void linear_through_float(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          bool gelu, Tensor& out);

// x [rows, K] times weight [M, K] transposed. The result is of the inputs' type or, for bfloat16
// taken through float32, the float32 one, still unrounded.
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
