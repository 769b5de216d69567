// token_logits: logits of chosen tokens and the log-sum-exp over the vocabulary, block by block, so
// that the logits of all words are never in memory at once.
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "gemm.h"

namespace blip_trace::ops {
namespace {

float value_of(float x) { return x; }

float value_of(bf16 x) {
  return static_cast<float>(c10::BFloat16(x.bits, c10::BFloat16::from_bits()));
}

constexpr std::int64_t block_bytes = 4 << 20;

void check_tokens(const Tensor& tokens, std::int64_t vocabulary) {
  const auto* values = const_data<std::int64_t>(tokens);
  for (std::int64_t i = 0; i < tokens.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < vocabulary, "blip_trace::token_logits: token ",
                      values[i], " is out of range for a vocabulary of ", vocabulary, ".");
  }
}

std::tuple<Tensor, Tensor> token_logits(const Tensor& hidden_in, const Tensor& weight_in,
                                        const Tensor& bias_in, const Tensor& tokens_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_layer("token_logits", "hidden", hidden_in, weight_in, bias_in);
  const std::int64_t rows = hidden_in.size(0), vocabulary = weight_in.size(0);
  check_token_sizes(tokens_in, rows, hidden_in);
  const Tensor tokens = tokens_in.contiguous();
  check_tokens(tokens, vocabulary);
  const Tensor hidden = hidden_in.contiguous(), weight = weight_in.contiguous(),
               bias = bias_in.contiguous();
  const std::int64_t chosen = tokens.size(1);
  // Near each other, and their difference is what counts.
  const auto options = hidden.options().dtype(at::kDouble);
  Tensor logits = at::empty({rows, chosen}, options), log_sum_exp = at::empty({rows}, options);
  std::vector<float> maxima(static_cast<std::size_t>(rows),
                            -std::numeric_limits<float>::infinity());
  std::vector<float> sums(static_cast<std::size_t>(rows), 0.0f);

  // Wide enough for the matrix product to run at its full rate, whatever the number of rows.
  const std::int64_t step =
      std::clamp<std::int64_t>(block_bytes / 4 / std::max<std::int64_t>(1, rows), 512, 8192);
  const auto* token = const_data<std::int64_t>(tokens);
  for (std::int64_t first = 0; first < vocabulary; first += step) {
    const std::int64_t words = std::min(step, vocabulary - first);
    const Tensor block = product(hidden, weight.narrow(0, first, words));
    with_types(block, hidden, [&](auto in, auto result) {
      using In = decltype(in);
      using Out = decltype(result);
      const In* values = const_data<In>(block);
      const Out* offsets = const_data<Out>(bias) + first;
      for_rows(rows, words, 16, [&](std::int64_t begin, std::int64_t end) {
        const auto& kernels = cpu::kernels().rows<In, Out>();
        for (std::int64_t r = begin; r < end; ++r) {
          const In* row = values + r * words;
          kernels.log_sum_exp(row, offsets, words, &maxima[r], &sums[r]);
          for (std::int64_t k = 0; k < chosen; ++k) {
            const std::int64_t word = token[r * chosen + k] - first;
            if (word < 0 || word >= words) continue;
            data<double>(logits)[r * chosen + k] = value_of(row[word]) + value_of(offsets[word]);
          }
        }
      });
    });
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const double max = maxima[r], sum = sums[r];
    data<double>(log_sum_exp)[r] = std::isinf(max) && !std::isnan(sum) ? max : max + std::log(sum);
  }
  return {logits, log_sum_exp};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(blip_trace, m) {
  m.def(
      "token_logits(Tensor hidden, Tensor weight, Tensor bias, Tensor tokens) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(blip_trace, CPU, m) { m.impl("token_logits", token_logits); }

}  // namespace blip_trace::ops
