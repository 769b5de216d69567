#include "binding.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>

namespace blip_trace::cuda {
namespace {

Type type_of(const Tensor& x) {
  return x.scalar_type() == at::kFloat ? Type::float32 : Type::bfloat16;
}

void check(const char* op, const char* wrong) {
  TORCH_CHECK(wrong == nullptr, "blip_trace::", op, ": CUDA says: ", wrong, ".");
}

void check_head(const char* op, std::int64_t size) {
  TORCH_CHECK_VALUE(size <= largest_head, "blip_trace::", op, ": heads of ", size,
                    " channels are too large for CUDA; at most ", largest_head, " are possible.");
}

const void* pointer(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

float scale_of(std::int64_t head_size) { return 1.0f / std::sqrt(static_cast<float>(head_size)); }

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const c10::OptionalDeviceGuard device(x.device());
  ops::check_layer("linear", "x", x, weight, bias);
  return at::linear(x, weight, bias);
}

Tensor linear_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const c10::OptionalDeviceGuard device(x.device());
  ops::check_layer("linear_gelu", "x", x, weight, bias_in);
  const Tensor bias = bias_in.contiguous();
  Tensor out = at::mm(x, weight.t());
  check("linear_gelu", bias_gelu({type_of(x), bias.const_data_ptr(), out.mutable_data_ptr(),
                                  out.size(0), out.size(1)},
                                 current_stream(x)));
  return out;
}

std::tuple<Tensor, Tensor> linear_add_norm(const Tensor& x, const Tensor& weight,
                                           const OptionalTensor& bias_in, const Tensor& residual_in,
                                           const OptionalTensor& residual_rows,
                                           const OptionalTensor& update_rows,
                                           const Tensor& norm_weight_in, const Tensor& norm_bias_in,
                                           double eps, bool return_sum) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const c10::OptionalDeviceGuard device(x.device());
  const std::int64_t rows = ops::check_add_norm(x, weight, bias_in, residual_in, residual_rows,
                                                update_rows, norm_weight_in, norm_bias_in);
  const OptionalTensor bias = ops::contiguous(bias_in);
  const Tensor residual = residual_in.contiguous();
  const Tensor norm_weight = norm_weight_in.contiguous(), norm_bias = norm_bias_in.contiguous();
  const Tensor update = at::mm(x, weight.t());
  const std::int64_t cols = update.size(1);
  Tensor normed = at::empty({rows, cols}, x.options());
  Tensor sum = at::empty({return_sum ? rows : 0, cols}, x.options());
  if (!return_sum) sum = sum.view({0});
  check("linear_add_norm",
        add_norm({type_of(x), update.const_data_ptr(), pointer(bias), residual.const_data_ptr(),
                  ops::const_data<std::int32_t>(residual_rows),
                  ops::const_data<std::int32_t>(update_rows), norm_weight.const_data_ptr(),
                  norm_bias.const_data_ptr(), normed.mutable_data_ptr(),
                  return_sum ? sum.mutable_data_ptr() : nullptr, rows, cols,
                  static_cast<float>(eps)},
                 current_stream(x)));
  return {normed, sum};
}

Tensor self_attention(const Tensor& qkv_in, const Tensor& starts, const OptionalTensor& prefixes,
                      std::int64_t heads, bool causal) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const c10::OptionalDeviceGuard device(qkv_in.device());
  const std::int64_t runs = ops::check_self_attention(qkv_in, starts, prefixes, heads);
  const Tensor qkv = qkv_in.contiguous();
  const std::int64_t channels = qkv.size(1) / 3, size = channels / heads;
  check_head("self_attention", size);
  Tensor out = at::empty({qkv.size(0), channels}, qkv.options());
  const Tensor query = qkv.narrow(1, 0, channels), key = qkv.narrow(1, channels, channels),
               value = qkv.narrow(1, 2 * channels, channels);
  const auto* marks = ops::const_data<std::int32_t>(starts);
  check("self_attention",
        attention({type_of(qkv), query.const_data_ptr(), key.const_data_ptr(),
                   value.const_data_ptr(), out.mutable_data_ptr(), 3 * channels, 3 * channels,
                   3 * channels, channels, marks, marks, ops::const_data<std::int32_t>(prefixes),
                   qkv.size(0), runs, static_cast<int>(heads), static_cast<int>(size),
                   scale_of(size), causal},
                  current_stream(qkv)));
  return out;
}

namespace {

struct Cross {
  const Tensor &query, &states, &key_weight, &value_weight, &query_starts, &state_starts;
  std::int64_t groups, heads, channels, size, width;  // width: that of the states
};

// Whether the projections are absorbed into the query and the weighted sum: the smaller product for
// groups of average size. The groups' own sizes are known to the device alone. On many states the
// absorbed products, as wide as the states for every head, take longer than they save.
bool absorb(const Cross& a) {
  constexpr std::int64_t many_states = 64;
  if (a.states.size(0) > many_states * a.groups) return false;
  const double rows = static_cast<double>(a.query.size(0)),
               all = static_cast<double>(a.states.size(0)),
               states = all / static_cast<double>(a.groups);
  const double projected = 4.0 * all * a.width * a.channels + 4.0 * rows * states * a.channels;
  const double absorbed = rows * (4.0 * a.channels * a.width + 4.0 * a.heads * states * a.width);
  return absorbed < projected;
}

void project(const Cross& a, Tensor& out) {
  const Tensor keys = at::linear(a.states, a.key_weight),
               values = at::linear(a.states, a.value_weight);
  check("cross_attention",
        attention({type_of(a.query), a.query.const_data_ptr(), keys.const_data_ptr(),
                   values.const_data_ptr(), out.mutable_data_ptr(), a.channels, a.channels,
                   a.channels, a.channels, ops::const_data<std::int32_t>(a.query_starts),
                   ops::const_data<std::int32_t>(a.state_starts), nullptr, a.query.size(0),
                   a.groups, static_cast<int>(a.heads), static_cast<int>(a.size),
                   scale_of(a.size), false},
                  current_stream(a.query)));
}

Tensor absorbed(const Cross& a) {
  const auto by_head = [&](const Tensor& weight) {
    return weight.view({a.heads, a.size, a.width});
  };
  const Tensor query = a.query.view({-1, a.heads, a.size}).transpose(0, 1);
  const Tensor mixed = at::bmm(query, by_head(a.key_weight));  // [heads, rows, width]
  Tensor sums = at::empty(mixed.sizes(), mixed.options());
  check("cross_attention",
        attend_states({type_of(a.query), mixed.const_data_ptr(), a.states.const_data_ptr(),
                       sums.mutable_data_ptr(), ops::const_data<std::int32_t>(a.query_starts),
                       ops::const_data<std::int32_t>(a.state_starts), a.query.size(0), a.groups,
                       a.width, static_cast<int>(a.heads), scale_of(a.size)},
                      current_stream(a.query)));
  const Tensor context = at::bmm(sums, by_head(a.value_weight).transpose(1, 2));
  return context.transpose(0, 1).reshape({a.query.size(0), a.channels});
}

}  // namespace

Tensor cross_attention(const Tensor& query_in, const Tensor& states_in,
                       const Tensor& key_weight_in, const Tensor& value_weight_in,
                       const Tensor& query_starts, const Tensor& state_starts,
                       std::int64_t heads) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const c10::OptionalDeviceGuard device(query_in.device());
  const std::int64_t groups = ops::check_cross_attention(
      query_in, states_in, key_weight_in, value_weight_in, query_starts, state_starts, heads);
  const Tensor query = query_in.contiguous(), states = states_in.contiguous(),
               key_weight = key_weight_in.contiguous(),
               value_weight = value_weight_in.contiguous();
  const std::int64_t channels = query.size(1);
  const Cross cross{query,  states, key_weight, value_weight,     query_starts,  state_starts,
                    groups, heads,  channels,   channels / heads, states.size(1)};
  Tensor out = at::empty(query.sizes(), query.options());
  if (query.size(0) == 0) return out;
  if (absorb(cross)) return absorbed(cross);
  check_head("cross_attention", cross.size);
  project(cross, out);
  return out;
}

std::tuple<Tensor, Tensor> token_logits(const Tensor& hidden, const Tensor& weight_in,
                                        const Tensor& bias_in, const Tensor& tokens_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const c10::OptionalDeviceGuard device(hidden.device());
  ops::check_layer("token_logits", "hidden", hidden, weight_in, bias_in);
  const std::int64_t rows = hidden.size(0), vocabulary = weight_in.size(0);
  ops::check_token_sizes(tokens_in, rows, hidden);
  const Tensor tokens = tokens_in.contiguous(), bias = bias_in.contiguous(),
               weight = weight_in.contiguous();
  const auto wide = hidden.options().dtype(at::kDouble);
  Tensor logits = at::empty({rows, tokens.size(1)}, wide), log_sum_exp = at::empty({rows}, wide);
  const Tensor running = at::empty({2, rows}, hidden.options().dtype(at::kFloat));
  auto* maximum = ops::data<float>(running);

  // So many bytes of logits at once that they are still in the second-level cache when they are read.
  constexpr std::int64_t block_bytes = 24 << 20;
  std::int64_t step =
      std::max<std::int64_t>(1024, block_bytes / 4 / std::max<std::int64_t>(1, rows));
  step -= step % 8;  // so that every block begins where 16 bytes can be read at once
  for (std::int64_t first = 0; first < vocabulary; first += step) {
    const std::int64_t words = std::min(step, vocabulary - first);
    const Tensor block = wide_product(hidden, weight.narrow(0, first, words));
    check("token_logits",
          fold_logits({type_of(hidden), ops::const_data<float>(block), bias.const_data_ptr(),
                       ops::const_data<std::int64_t>(tokens), first, words, rows, tokens.size(1),
                       vocabulary, maximum, maximum + rows, ops::data<double>(logits),
                       ops::data<double>(log_sum_exp)},
                      current_stream(hidden)));
  }
  return {logits, log_sum_exp};
}

}  // namespace blip_trace::cuda
