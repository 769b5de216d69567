// Small matrix products on a right-hand side packed in panels: the inner part of attention, and the
// products per head that are too small and too many for a BLAS call each.
#pragma once

#include "vec.h"

namespace blip_trace::cpu::BLIP_TRACE_ISA {

constexpr int64_t panel_vectors = BLIP_TRACE_PANEL_VECTORS;
constexpr int64_t panel_width = panel_vectors * width;
constexpr int64_t tile_rows = 6;
// A panel's part that is worked on stays in the second-level cache, from where it is fast enough;
// shorter ones, for the first level, cost more in reading and writing the sums.
constexpr int64_t depth_step = 1024;

BLIP_TRACE_INLINE int64_t panel_columns(int64_t n, int64_t first) {
  return min_of(panel_width, round_up(n - first, width));
}

template <class T>
static void pack(const T* source, int64_t stride, int64_t k, int64_t n, float* packed) {
  for (int64_t first = 0; first < n; first += panel_width) {
    const int64_t columns = panel_columns(n, first);
    for (int64_t i = 0; i < k; ++i, packed += columns) {
      const T* row = source + i * stride + first;
      for (int64_t j = 0; j < columns; j += width) {
        const int64_t rest = n - first - j;
        store(packed + j, rest >= width ? load(row + j) : load_part(row + j, rest));
      }
    }
  }
}

#if BLIP_TRACE_BF16_PRODUCTS
// Source [k, n] in pairs along k; zeros where k is odd.
static void pack_pairs(const bf16* source, int64_t stride, int64_t k, int64_t n, float* packed) {
  const auto bits = [=](int64_t row, int64_t col) {
    const int64_t rest = n - col;
    return row >= k ? Vec{} : rest >= width ? load(source + row * stride + col)
                                            : load_part(source + row * stride + col, rest);
  };
  for (int64_t first = 0; first < n; first += panel_width) {
    const int64_t columns = panel_columns(n, first);
    for (int64_t i = 0; i < k; i += 2, packed += columns) {
      for (int64_t j = 0; j < columns; j += width) {
        // As floats they stand in the upper halves.
        const BitVec low = reinterpret_cast<BitVec>(bits(i, first + j)) >> 16;
        const BitVec high = reinterpret_cast<BitVec>(bits(i + 1, first + j));
        store(packed + j, reinterpret_cast<Vec>(low | high));
      }
    }
  }
}
#endif

// Where lane l of a pair (a, b) of rows comes from in a transposition's step: lanes whose number
// lacks the bit `step` are taken for the first row of the pair, the others for the second.
template <int step>
struct Exchange {
  std::int32_t first[width], second[width];
  constexpr Exchange() : first{}, second{} {
    for (int l = 0; l < width; ++l) {
      first[l] = l & step ? width + l - step : l;
      second[l] = l & step ? width + l : l + step;
    }
  }
};

template <int step>
BLIP_TRACE_INLINE void exchange(Vec (&rows)[width]) {
  static constexpr Exchange<step> lanes;
  IntVec first, second;
  __builtin_memcpy(&first, lanes.first, sizeof(first));
  __builtin_memcpy(&second, lanes.second, sizeof(second));
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) {
    if (i & step) continue;
    const Vec a = rows[i], b = rows[i + step];
    rows[i] = shuffle(a, b, first);
    rows[i + step] = shuffle(a, b, second);
  }
  if constexpr (2 * step < width) exchange<2 * step>(rows);
}

// Writes the transpose of source [n, k] into `columns` columns of a panel, zeros beyond n.
template <class T>
static void pack_panel_transposed(const T* source, int64_t stride, int64_t k, int64_t n,
                                  int64_t columns, float* packed) {
  for (int64_t j = 0; j < columns; j += width) {
    for (int64_t i = 0; i < k; i += width) {
      const int64_t deep = min_of(width, k - i);
      Vec rows[width];
#pragma GCC unroll 16
      for (int64_t r = 0; r < width; ++r) {
        const T* from = source + (j + r) * stride + i;
        rows[r] = j + r >= n ? Vec{} : deep == width ? load(from) : load_part(from, deep);
      }
      exchange<1>(rows);
      float* to = packed + i * columns + j;
      if (deep == width) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < width; ++r) store(to + r * columns, rows[r]);
      } else {
        for (int64_t r = 0; r < deep; ++r) store(to + r * columns, rows[r]);
      }
    }
  }
}

template <class T>
static void pack_transposed(const T* source, int64_t stride, int64_t k, int64_t n, float* packed) {
  for (int64_t first = 0; first < n; first += panel_width) {
    const int64_t columns = panel_columns(n, first);
    pack_panel_transposed(source + first * stride, stride, k, n - first, columns,
                          packed + first * k);
  }
}

BLIP_TRACE_INLINE Vec multiply_add(float a, Vec b, Vec sum) { return splat(a) * b + sum; }

#if BLIP_TRACE_BF16_PRODUCTS
BLIP_TRACE_INLINE Vec multiply_add(Pair a, Vec b, Vec sum) {
  const __m512i both = _mm512_set1_epi32(static_cast<int>(a.bits));
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                reinterpret_cast<__m512bh>(both),
                                                reinterpret_cast<__m512bh>(b)));
}
#endif

// c [rows, vectors * width] (+)= a [rows, k] times a panel [k, vectors * width].
template <class Word, int rows, int vectors>
static void tile(const Word* a, int64_t a_stride, int64_t k, const float* panel,
                 int64_t panel_stride, float* c, int64_t c_stride, bool add) {
  Vec acc[rows][vectors] = {};
  for (int64_t at = 0; at < k; ++at, panel += panel_stride) {
    Vec b[vectors];
    for (int j = 0; j < vectors; ++j) b[j] = load(panel + j * width);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j)
        acc[i][j] = multiply_add(a[i * a_stride + at], b[j], acc[i][j]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) {
      float* to = c + i * c_stride + j * width;
      store(to, add ? load(to) + acc[i][j] : acc[i][j]);
    }
  }
}

template <class Word>
using Tile = void (*)(const Word*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);

template <class Word, int vectors>
BLIP_TRACE_INLINE Tile<Word> tile_of(int64_t rows) {
  constexpr Tile<Word> tiles[] = {tile<Word, 1, vectors>, tile<Word, 2, vectors>,
                                  tile<Word, 3, vectors>, tile<Word, 4, vectors>,
                                  tile<Word, 5, vectors>, tile<Word, 6, vectors>};
  return tiles[rows - 1];
}

template <class Word>
BLIP_TRACE_INLINE Tile<Word> tile_of(int64_t rows, int64_t vectors) {
  switch (vectors) {
    case 1:
      return tile_of<Word, 1>(rows);
    case 2:
      return tile_of<Word, 2>(rows);
#if BLIP_TRACE_PANEL_VECTORS > 2
    case 3:
      return tile_of<Word, 3>(rows);
    default:
      return tile_of<Word, 4>(rows);
#else
    default:
      return tile_of<Word, 2>(rows);
#endif
  }
}

// c [m, n rounded up to whole vectors] (+)= a [m, k] times the first k rows and n columns of
// `right`.
template <class Word>
static void product(const Word* a, int64_t a_stride, int64_t m, int64_t k, int64_t n,
                    const Panels& right, float* c, int64_t c_stride, bool add = false) {
  for (int64_t depth = 0; depth == 0 || depth < k; depth += depth_step) {
    const int64_t steps = min_of(depth_step, k - depth);
    for (int64_t first = 0; first < n; first += panel_width) {
      const int64_t columns = panel_columns(right.n, first);
      const int64_t stride = right.stride ? right.stride : columns;
      const float* panel = right.data + (right.stride ? first : first * right.k) + depth * stride;
      for (int64_t row = 0; row < m; row += tile_rows) {
        tile_of<Word>(min_of(tile_rows, m - row), columns / width)(
            a + row * a_stride + depth, a_stride, steps, panel, stride, c + row * c_stride + first,
            c_stride, add || depth != 0);
      }
    }
  }
}

// to [rows, cols rounded up] = from [rows, cols], zeros behind each row.
template <class T>
static void copy_rows(const T* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,
                      int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += width) {
      const T* p = from + r * from_stride + c;
      store(to + r * to_stride + c, cols - c >= width ? load(p) : load_part(p, cols - c));
    }
  }
}

template <class T>
BLIP_TRACE_INLINE void copy_row(const float* from, float scale, T* to, int64_t cols) {
  for (int64_t c = 0; c < cols; c += width) {
    const Vec v = load(from + c) * scale;
    if (cols - c >= width) {
      store(to + c, v);
    } else {
      store_part(to + c, v, cols - c);
    }
  }
}

BLIP_TRACE_INLINE const float* as_floats(const float* x) { return x; }
BLIP_TRACE_INLINE const float* as_floats(const bf16*) { return nullptr; }
BLIP_TRACE_INLINE float* as_floats(float* x) { return x; }
BLIP_TRACE_INLINE float* as_floats(bf16*) { return nullptr; }

template <class A, class C>
static void multiply(const A* a, int64_t a_stride, int64_t m, const Panels& right, C* c,
                     int64_t c_stride, float* scratch) {
  const float* left = as_floats(a);
  int64_t left_stride = a_stride;
  if (!left) {
    left_stride = round_up(right.k, width);
    copy_rows(a, a_stride, m, right.k, scratch, left_stride);
    left = scratch;
    scratch += m * left_stride;
  }
  if (float* out = as_floats(c); out && right.n % width == 0) {
    product(left, left_stride, m, right.k, right.n, right, out, c_stride);
    return;
  }
  const int64_t out_stride = round_up(right.n, width);
  product(left, left_stride, m, right.k, right.n, right, scratch, out_stride);
  for (int64_t r = 0; r < m; ++r)
    copy_row(scratch + r * out_stride, 1.0f, c + r * c_stride, right.n);
}

}  // namespace blip_trace::cpu::BLIP_TRACE_ISA
