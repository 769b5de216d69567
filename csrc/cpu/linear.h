// A linear layer: a part of the weight is transposed into the second-level cache and multiplied with
// all rows there; bias, GELU and rounding follow while a part of the result is there too. Weights
// stay as they are in memory: packing a part again in every call costs a few percent of the
// products that it serves, packed copies of all weights would double the model.
#pragma once

#include "product.h"
#include "rows.h"
#include "vec.h"

namespace blip_trace::cpu::BLIP_TRACE_ISA {

// A part of the weight that is packed at once (columns of the result, words of the inputs), and the
// rows that go through it together.
constexpr int64_t linear_columns = panel_width;
constexpr int64_t linear_depth = depth_step;
constexpr int64_t linear_rows = tile_rows;

template <class X, class W, class Out>
static void finish(const Linear<X, W, Out>& args, const float* values, int64_t row, int64_t rows,
                   int64_t first, int64_t columns) {
  const W* bias = args.bias ? args.bias + first : nullptr;
  for (int64_t r = 0; r < rows; ++r, values += linear_columns) {
    Out* out = args.out + (row + r) * args.cols + first;
    if (args.gelu) {
      for_columns(columns, [=](int64_t c, auto get, auto put) {
        put(out + c, gelu_of(bias ? get(values + c) + get(bias + c) : get(values + c)));
      });
    } else {
      for_columns(columns, [=](int64_t c, auto get, auto put) {
        put(out + c, bias ? get(values + c) + get(bias + c) : get(values + c));
      });
    }
  }
}

// What a product takes from a row of X at once, and as what it reads the weight then.
template <class X>
struct Words {
  using Left = float;
  template <class W>
  using Right = W;
  static constexpr int64_t elements = 1;
};

template <>
struct Words<bf16> {
  using Left = Pair;
  template <class W>
  using Right = Pair;
  static constexpr int64_t elements = 2;
};

template <class X, class W, class Out>
static void linear(const Linear<X, W, Out>& args, int64_t row_begin, int64_t row_end,
                   int64_t col_begin, int64_t col_end, float* scratch) {
  using Left = typename Words<X>::Left;
  using Right = typename Words<X>::template Right<W>;
  const int64_t k = args.k / Words<X>::elements;
  const auto* x = reinterpret_cast<const Left*>(args.x);
  const auto* weight = reinterpret_cast<const Right*>(args.weight);
  float* packed = scratch;
  float* values = packed + min_of(k, linear_depth) * linear_columns;
  const bool at_once = k <= linear_depth;
  for (int64_t first = col_begin; first < col_end; first += linear_columns) {
    const int64_t columns = min_of(linear_columns, col_end - first);
    for (int64_t depth = 0; depth == 0 || depth < k; depth += linear_depth) {
      const int64_t deep = min_of(linear_depth, k - depth);
      pack_transposed(weight + first * k + depth, k, deep, columns, packed);
      const bool last = depth + deep == k;
      for (int64_t row = row_begin; row < row_end; row += linear_rows) {
        const int64_t rows = min_of(linear_rows, row_end - row);
        float* part = values + (at_once ? 0 : row - row_begin) * linear_columns;
        product(x + row * k + depth, k, rows, deep, columns, {packed, deep, columns}, part,
                linear_columns, depth != 0);
        if (last) finish(args, part, row, rows, first, columns);
      }
    }
  }
}

}  // namespace blip_trace::cpu::BLIP_TRACE_ISA
