// A linear layer of bfloat16 weights: a part of them is converted and transposed into the
// second-level cache and multiplied with all rows there; bias, GELU and rounding follow while a
// part of the result is there too. (For float32 weights the same is slower than MKL by a fifth.)
#pragma once

#include "product.h"
#include "rows.h"
#include "vec.h"

namespace blip_trace::cpu::BLIP_TRACE_ISA {

// A part of the weight that is packed at once (columns of the result, inputs), and the rows that go
// through it together: the part, the rows and their results fill the second-level cache.
constexpr int64_t linear_columns = 128;
constexpr int64_t linear_depth = 1024;
constexpr int64_t linear_rows = 48;

template <class Out>
static void finish(const Linear<Out>& args, const float* values, int64_t row, int64_t rows,
                   int64_t first, int64_t columns) {
  const bf16* bias = args.bias ? args.bias + first : nullptr;
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

template <class Out>
static void linear(const Linear<Out>& args, int64_t row_begin, int64_t row_end, int64_t col_begin,
                   int64_t col_end, float* scratch) {
  float* packed = scratch;
  float* values = packed + min_of(args.k, linear_depth) * linear_columns;
  const bool at_once = args.k <= linear_depth;
  for (int64_t first = col_begin; first < col_end; first += linear_columns) {
    const int64_t columns = min_of(linear_columns, col_end - first);
    for (int64_t depth = 0; depth == 0 || depth < args.k; depth += linear_depth) {
      const int64_t deep = min_of(linear_depth, args.k - depth);
      pack_transposed(args.weight + first * args.k + depth, args.k, deep, columns, packed);
      for (int64_t row = row_begin; row < row_end; row += linear_rows) {
        const int64_t rows = min_of(linear_rows, row_end - row);
        float* part = values + (at_once ? 0 : row - row_begin) * linear_columns;
        product(args.x + row * args.k + depth, args.k, rows, deep, columns, {packed, deep, columns},
                part, linear_columns, depth != 0);
        if (depth + deep == args.k) finish(args, part, row, rows, first, columns);
      }
    }
  }
}

}  // namespace blip_trace::cpu::BLIP_TRACE_ISA
