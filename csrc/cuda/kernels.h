// The CUDA kernels, as the bindings see them: device pointers, sizes and a stream, nothing of torch
// and no CUDA header. Matrices lie row after row; a stride is the elements from one row to the next.
//
// Launchers return nullptr, or what CUDA says went wrong. They read no device memory on the host and
// take their grids from sizes alone, so that they never wait and can be captured in a graph.
#pragma once

#include <cstdint>

namespace blip_trace::cuda {

using Stream = void*;  // a cudaStream_t

enum class Type { float32, bfloat16 };

// Multi-head attention of packed groups. Rows query_starts[g] to query_starts[g + 1] are group g's
// and see its keys, rows key_starts[g] to key_starts[g + 1], before them those of its prefix, and
// nothing else. Heads lie side by side, `head_size` elements each.
struct Attention {
  Type type;
  const void *query, *key, *value;
  void* out;
  std::int64_t query_stride, key_stride, value_stride, out_stride;
  const std::int32_t *query_starts, *key_starts;  // [groups + 1]
  const std::int32_t* prefixes;  // [groups, 2], first key row and how many; or null
  std::int64_t rows, groups;     // rows: of queries
  int heads, head_size;
  float scale;  // positive
  bool causal;  // a group's query i sees its own keys up to i; needs as many keys as queries
};

// Head sizes up to this.
constexpr int largest_head = 128;

const char* attention(const Attention&, Stream);

// The same where the keys and values are the group's states themselves, `width` wide, for all heads,
// as absorbed projections leave it. query and out [heads, rows, width], states [.., width].
struct AttendStates {
  Type type;
  const void *query, *states;
  void* out;
  const std::int32_t *query_starts, *state_starts;  // [groups + 1]
  std::int64_t rows, groups, width;
  int heads;
  float scale;
};

const char* attend_states(const AttendStates&, Stream);

// sum[i] = residual[residual_rows[i]] + update[update_rows[i]] + bias, normed[i] = LayerNorm(sum[i]),
// of `rows` rows. Row numbers absent: i.
struct AddNorm {
  Type type;
  const void *update, *bias, *residual;  // [.., cols], [cols] or null, [.., cols]
  const std::int32_t *residual_rows, *update_rows;
  const void *norm_weight, *norm_bias;
  void *normed, *sum;  // [rows, cols]; sum may be null
  std::int64_t rows, cols;
  float eps;
};

const char* add_norm(const AddNorm&, Stream);

// x [rows, cols] becomes GELU(x + bias), the exact one.
struct BiasGelu {
  Type type;
  const void* bias;
  void* x;
  std::int64_t rows, cols;
};

const char* bias_gelu(const BiasGelu&, Stream);

// Of logits of a block of the vocabulary, without their bias, what token_logits keeps. `maximum` and
// `sum` [rows] hold the running log-sum-exp between the first block and the last.
struct FoldLogits {
  Type type;            // of the bias
  const float* values;  // [rows, words], of the words from `first_word` on
  const void* bias;     // [vocabulary]
  const std::int64_t* tokens;  // [rows, chosen]
  std::int64_t first_word, words, rows, chosen, vocabulary;
  float *maximum, *sum;
  double *logits, *log_sum_exp;  // [rows, chosen], [rows]
};

const char* fold_logits(const FoldLogits&, Stream);

}  // namespace blip_trace::cuda
