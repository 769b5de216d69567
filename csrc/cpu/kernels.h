// The kernels of the CPU backend: plain pointers and sizes, no torch. Every instruction set has its
// own build of all of them (kernels_<name>.cpp), and `kernels()` gives the one chosen at run time.
#pragma once

#include <cstdint>

namespace blip_trace::cpu {

struct bf16 {
  std::uint16_t bits;
};

// Two bfloat16 side by side: what the processor's bfloat16 products take as one operand.
struct Pair {
  std::uint32_t bits;
};

// What ends a sublayer: sum[i] = residual[residual_rows[i]] + update[update_rows[i]] + bias, and
// its LayerNorm. `In` is the type of the matrix product, `Out` that of weights and results.
template <class In, class Out>
struct AddNorm {
  const In* update;                   // [rows of the batch before, cols]
  const Out* bias;                    // [cols] or null
  const Out* residual;                // [rows, cols]
  const std::int32_t* residual_rows;  // null: row i
  const std::int32_t* update_rows;    // null: row i
  const Out* norm_weight;
  const Out* norm_bias;
  float eps;
  std::int64_t cols;
  Out* normed;  // [rows that go on, cols]
  Out* sum;     // likewise, or null
};

// Passes over the rows of a matrix product.
template <class In, class Out>
struct RowKernels {
  // Rows [begin, end) of the result; scratch [cols].
  void (*add_norm)(const AddNorm<In, Out>& args, std::int64_t begin, std::int64_t end,
                   float* scratch);
  // Adds columns x [cols] + bias to a row's running maximum and sum of exponentials.
  void (*log_sum_exp)(const In* x, const Out* bias, std::int64_t cols, float* max, float* sum);
};

// The right-hand side of a product: K x N words (floats, or pairs along K) in panels of
// `panel_width()` columns, each panel a contiguous [K, width] (the last one rounded up to whole
// vectors with zeros). Or, not worth packing, a plain matrix of whole vectors a row: then `stride`
// is that between its rows.
struct Panels {
  const float* data;
  std::int64_t k;
  std::int64_t n;
  std::int64_t stride = 0;  // 0: packed
};

template <class T>
struct GeluKernels {
  // y = GELU(y + bias); a null bias is none.
  void (*add_bias_gelu)(const T* bias, T* y, std::int64_t rows, std::int64_t cols);
};

template <class T>
struct PackKernels {
  // source [k, n] or, transposed, [n, k]; `stride` is that between its rows.
  void (*pack)(const T* source, std::int64_t stride, std::int64_t k, std::int64_t n, float* packed);
  void (*pack_transposed)(const T* source, std::int64_t stride, std::int64_t k, std::int64_t n,
                          float* packed);
};

// T: type of the query and of the result.
template <class T>
struct AttentionKernels {
  // out [n, d_v] = softmax(scale * query keys) values, for n <= query_block() rows. keys: Panels
  // [d, m], values: Panels [m, d_v]. Row i sees the first `visible + i` keys (all m, if that is
  // more).
  void (*attend)(const T* query, std::int64_t query_stride, std::int64_t n, const Panels& keys,
                 const Panels& values, float scale, std::int64_t visible, T* out,
                 std::int64_t out_stride, float* scratch);
};

// The same on pairs, for head sizes and strides that are even; null without such products. The
// panels hold pairs along what is summed over: keys [d / 2, m], values [m / 2 rounded up, d_v].
struct PairKernels {
  void (*attend)(const bf16* query, std::int64_t query_stride, std::int64_t n, const Panels& keys,
                 const Panels& values, float scale, std::int64_t visible, bf16* out,
                 std::int64_t out_stride, float* scratch);
  void (*pack_keys)(const Pair* source, std::int64_t stride, std::int64_t k, std::int64_t n,
                    float* packed);
  void (*pack_values)(const bf16* source, std::int64_t stride, std::int64_t k, std::int64_t n,
                      float* packed);
};

template <class A, class C>
struct ProductKernels {
  // c [m, right.n] = a [m, right.k] times right; scratch: see `product_scratch`.
  void (*multiply)(const A* a, std::int64_t a_stride, std::int64_t m, const Panels& right, C* c,
                   std::int64_t c_stride, float* scratch);
};

// A linear layer: out [rows, cols] = x [rows, k] times weight [cols, k] transposed, plus bias,
// through GELU where that is asked for. Sums are float32.
template <class X, class W, class Out>
struct Linear {
  const X* x;
  std::int64_t k;  // even, where x is bfloat16
  const W* weight;
  const W* bias;  // null: none
  Out* out;
  std::int64_t cols;
  bool gelu;
};

template <class X, class W, class Out>
struct LinearKernels {
  // A block of the result; best of whole blocks. scratch: see `linear_scratch`. Null: the
  // instruction set has no such products.
  void (*linear)(const Linear<X, W, Out>& args, std::int64_t row_begin, std::int64_t row_end,
                 std::int64_t col_begin, std::int64_t col_end, float* scratch);
};

struct Kernels {
  const char* name;
  std::int64_t width;                        // floats in a vector
  std::int64_t linear_columns, linear_rows;  // of the blocks that `linear` works in
  RowKernels<float, float> rows_f32;
  RowKernels<float, bf16> rows_f32_bf16;
  RowKernels<bf16, bf16> rows_bf16;
  void (*widen)(const bf16* from, float* to, std::int64_t count);
  PackKernels<float> pack_f32;
  PackKernels<bf16> pack_bf16;
  AttentionKernels<float> attention_f32;
  AttentionKernels<bf16> attention_bf16;
  PairKernels pairs;
  ProductKernels<float, float> product_f32;
  ProductKernels<bf16, float> product_bf16_f32;
  ProductKernels<float, bf16> product_f32_bf16;
  LinearKernels<float, float, float> linear_f32;
  LinearKernels<float, bf16, float> linear_wide_f32;
  LinearKernels<float, bf16, bf16> linear_wide_bf16;
  LinearKernels<bf16, bf16, float> linear_bf16_f32;
  LinearKernels<bf16, bf16, bf16> linear_bf16;
  GeluKernels<float> gelu_f32;
  GeluKernels<bf16> gelu_bf16;

  // The members above by type.
  template <class In, class Out>
  const RowKernels<In, Out>& rows() const;
  template <class T>
  const PackKernels<T>& pack() const;
  template <class T>
  const AttentionKernels<T>& attention() const;
  template <class A, class C>
  const ProductKernels<A, C>& product() const;
  template <class X, class W, class Out>
  const LinearKernels<X, W, Out>& linear() const;
  template <class T>
  const GeluKernels<T>& gelu() const;

  std::int64_t padded(std::int64_t n) const { return (n + width - 1) / width * width; }
  std::int64_t packed_size(std::int64_t k, std::int64_t n) const { return k * padded(n); }
  // source [k, n] for products with `rows` rows: as it is where packing would not pay, else in
  // `packed`.
  template <class T>
  Panels panels(const T* source, std::int64_t stride, std::int64_t k, std::int64_t n,
                std::int64_t rows, float* packed) const {
    constexpr std::int64_t few = 24;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (rows <= few && n % width == 0) return {source, k, n, stride};
    }
    pack<T>().pack(source, stride, k, n, packed);
    return {packed, k, n};
  }
  std::int64_t attention_scratch(std::int64_t n, std::int64_t d, std::int64_t m,
                                 std::int64_t d_v) const {
    return n * (padded(d) + padded(m) + padded(d_v) + 1);
  }
  std::int64_t product_scratch(std::int64_t m, std::int64_t k, std::int64_t n) const {
    return m * (padded(k) + padded(n));
  }
  std::int64_t linear_scratch(std::int64_t rows, std::int64_t k) const {
    return (k + (rows > linear_rows ? rows : linear_rows)) * linear_columns;
  }
};

template <>
inline const RowKernels<float, float>& Kernels::rows() const {
  return rows_f32;
}
template <>
inline const RowKernels<float, bf16>& Kernels::rows() const {
  return rows_f32_bf16;
}
template <>
inline const RowKernels<bf16, bf16>& Kernels::rows() const {
  return rows_bf16;
}
template <>
inline const PackKernels<float>& Kernels::pack() const {
  return pack_f32;
}
template <>
inline const PackKernels<bf16>& Kernels::pack() const {
  return pack_bf16;
}
template <>
inline const AttentionKernels<float>& Kernels::attention() const {
  return attention_f32;
}
template <>
inline const AttentionKernels<bf16>& Kernels::attention() const {
  return attention_bf16;
}
template <>
inline const ProductKernels<float, float>& Kernels::product() const {
  return product_f32;
}
template <>
inline const ProductKernels<bf16, float>& Kernels::product() const {
  return product_bf16_f32;
}
template <>
inline const ProductKernels<float, bf16>& Kernels::product() const {
  return product_f32_bf16;
}

template <>
inline const LinearKernels<float, float, float>& Kernels::linear() const {
  return linear_f32;
}
template <>
inline const LinearKernels<float, bf16, float>& Kernels::linear() const {
  return linear_wide_f32;
}
template <>
inline const LinearKernels<float, bf16, bf16>& Kernels::linear() const {
  return linear_wide_bf16;
}
template <>
inline const LinearKernels<bf16, bf16, float>& Kernels::linear() const {
  return linear_bf16_f32;
}
template <>
inline const LinearKernels<bf16, bf16, bf16>& Kernels::linear() const {
  return linear_bf16;
}
template <>
inline const GeluKernels<float>& Kernels::gelu() const {
  return gelu_f32;
}
template <>
inline const GeluKernels<bf16>& Kernels::gelu() const {
  return gelu_bf16;
}

namespace isa_default {
const Kernels& table();
}
namespace isa_avx2 {
const Kernels& table();
}
namespace isa_avx512 {
const Kernels& table();
}
namespace isa_avx512_bf16 {
const Kernels& table();
}

}  // namespace blip_trace::cpu
