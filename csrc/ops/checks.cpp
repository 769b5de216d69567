#include "checks.h"

namespace blip_trace::ops {
namespace {

void check_here(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK_VALUE(x.device() == like.device(), "blip_trace::", op, ": ", name, " is on ",
                    x.device(), ", but the input is on ", like.device(), ".");
}

}  // namespace

void check_matrix(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
                    "blip_trace::", op, " takes float32 or bfloat16, and ", name, " is ",
                    x.scalar_type(), ".");
  TORCH_CHECK_VALUE(x.dim() == 2, "blip_trace::", op, ": ", name,
                    " must have two dimensions, but its shape is ", x.sizes(), ".");
}

void check_like(const char* op, const char* name, const Tensor& x, const Tensor& like,
                at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.scalar_type() == like.scalar_type(), "blip_trace::", op, ": ", name, " is ",
                    x.scalar_type(), ", but the input is ", like.scalar_type(),
                    "; both must be of one type.");
  check_here(op, name, x, like);
  TORCH_CHECK_VALUE(x.sizes() == sizes, "blip_trace::", op, ": ", name, " must have shape ", sizes,
                    ", but it is ", x.sizes(), ".");
}

void check_row_numbers(const char* op, const char* name, const Tensor& rows, const Tensor& like) {
  TORCH_CHECK_VALUE(rows.scalar_type() == at::kInt && rows.dim() == 1 && rows.is_contiguous(),
                    "blip_trace::", op, ": ", name, " must be a contiguous vector of int32.");
  check_here(op, name, rows, like);
}

std::int64_t check_marks(const char* op, const char* name, const Tensor& starts,
                         const Tensor& like) {
  TORCH_CHECK_VALUE(starts.scalar_type() == at::kInt && starts.dim() == 1 &&
                        starts.is_contiguous() && starts.numel() >= 1,
                    "blip_trace::", op, ": ", name,
                    " must be a contiguous vector of int32 that is not empty.");
  check_here(op, name, starts, like);
  return starts.numel() - 1;
}

void check_prefix_sizes(const Tensor& prefixes, std::int64_t runs, const Tensor& like) {
  TORCH_CHECK_VALUE(prefixes.scalar_type() == at::kInt && prefixes.is_contiguous() &&
                        prefixes.dim() == 2 && prefixes.size(0) == runs && prefixes.size(1) == 2,
                    "blip_trace::self_attention: prefixes must be contiguous int32 [", runs,
                    ", 2], but it is ", prefixes.scalar_type(), " ", prefixes.sizes(), ".");
  check_here("self_attention", "prefixes", prefixes, like);
}

void check_token_sizes(const Tensor& tokens, std::int64_t rows, const Tensor& like) {
  TORCH_CHECK_VALUE(
      tokens.scalar_type() == at::kLong && tokens.dim() == 2 && tokens.size(0) == rows,
      "blip_trace::token_logits: tokens must be int64 [", rows, ", K], but it is ",
      tokens.scalar_type(), " ", tokens.sizes(), ".");
  check_here("token_logits", "tokens", tokens, like);
}

void check_layer(const char* op, const char* name, const Tensor& x, const Tensor& weight,
                 const OptionalTensor& bias) {
  check_matrix(op, name, x);
  check_like(op, "weight", weight, x, {weight.size(0), x.size(1)});
  if (bias) check_like(op, "bias", *bias, x, {weight.size(0)});
}

std::int64_t check_add_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const Tensor& residual, const OptionalTensor& residual_rows,
                            const OptionalTensor& update_rows, const Tensor& norm_weight,
                            const Tensor& norm_bias) {
  constexpr const char* op = "linear_add_norm";
  const std::int64_t cols = weight.size(0);
  check_layer(op, "x", x, weight, bias);
  check_matrix(op, "residual", residual);
  check_like(op, "residual", residual, x, {residual.size(0), cols});
  check_like(op, "norm_weight", norm_weight, x, {cols});
  check_like(op, "norm_bias", norm_bias, x, {cols});
  if (residual_rows) check_row_numbers(op, "residual_rows", *residual_rows, x);
  if (update_rows) check_row_numbers(op, "update_rows", *update_rows, x);
  const std::int64_t rows = residual_rows ? residual_rows->numel() : residual.size(0);
  const std::int64_t updates = update_rows ? update_rows->numel() : x.size(0);
  TORCH_CHECK_VALUE(rows == updates, "blip_trace::linear_add_norm: ", rows,
                    " rows of the residual stream meet ", updates,
                    " updates; there must be as many of each.");
  return rows;
}

std::int64_t check_self_attention(const Tensor& qkv, const Tensor& starts,
                                  const OptionalTensor& prefixes, std::int64_t heads) {
  check_matrix("self_attention", "qkv", qkv);
  TORCH_CHECK_VALUE(heads > 0 && qkv.size(1) % (3 * heads) == 0,
                    "blip_trace::self_attention: qkv of width ", qkv.size(1),
                    " does not hold queries, keys and values of ", heads, " heads.");
  const std::int64_t runs = check_marks("self_attention", "starts", starts, qkv);
  if (prefixes) check_prefix_sizes(*prefixes, runs, qkv);
  return runs;
}

std::int64_t check_cross_attention(const Tensor& query, const Tensor& states,
                                   const Tensor& key_weight, const Tensor& value_weight,
                                   const Tensor& query_starts, const Tensor& state_starts,
                                   std::int64_t heads) {
  constexpr const char* op = "cross_attention";
  check_matrix(op, "query", query);
  check_matrix(op, "states", states);
  const std::int64_t channels = query.size(1), width = states.size(1);
  check_like(op, "states", states, query, states.sizes());
  check_like(op, "key_weight", key_weight, query, {channels, width});
  check_like(op, "value_weight", value_weight, query, {channels, width});
  TORCH_CHECK_VALUE(heads > 0 && channels % heads == 0,
                    "blip_trace::cross_attention: a query of width ", channels,
                    " does not divide into ", heads, " heads.");
  const std::int64_t groups = check_marks(op, "query_starts", query_starts, query);
  TORCH_CHECK_VALUE(check_marks(op, "state_starts", state_starts, query) == groups,
                    "blip_trace::cross_attention: query_starts marks ", groups,
                    " groups and state_starts ", state_starts.numel() - 1,
                    "; there must be as many of each.");
  return groups;
}

}  // namespace blip_trace::ops
