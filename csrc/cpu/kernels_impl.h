// All kernels for one instruction set: included once by each kernels_<name>.cpp, which defines
//   BLIP_TRACE_ISA            the namespace
//   BLIP_TRACE_ISA_NAME       its name, as in ATEN_CPU_CAPABILITY
//   BLIP_TRACE_VECTOR_FLOATS  floats in a vector register
//   BLIP_TRACE_PANEL_VECTORS  vectors side by side in a tile of a product
// and BLIP_TRACE_BF16_PRODUCTS where the instruction set multiplies bfloat16.
// No torch header and no template of the standard library may come in here: the linker keeps one
// copy of an inline function for everybody, and it could be the one compiled for AVX-512.
#include "attention.h"
#include "kernels.h"
#include "linear.h"
#include "product.h"
#include "rows.h"
#include "vec.h"

namespace blip_trace::cpu::BLIP_TRACE_ISA {

template <class In, class Out>
constexpr RowKernels<In, Out> row_kernels{add_norm<In, Out>, log_sum_exp<In, Out>};

#if BLIP_TRACE_BF16_PRODUCTS
template <class Out>
constexpr auto linear_of_pairs = linear<bf16, bf16, Out>;
constexpr PairKernels pair_kernels{attend<PairWeights, bf16>, pack_transposed<Pair>, pack_pairs};
#else
template <class Out>
constexpr decltype(nullptr) linear_of_pairs = nullptr;
constexpr PairKernels pair_kernels{};
#endif

const Kernels& table() {
  static constexpr Kernels kernels{
      BLIP_TRACE_ISA_NAME,
      width,
      linear_columns,
      linear_rows,
      row_kernels<float, float>,
      row_kernels<float, bf16>,
      row_kernels<bf16, bf16>,
      widen,
      {pack<float>, pack_transposed<float>},
      {pack<bf16>, pack_transposed<bf16>},
      {attend<FloatWeights, float>},
      {attend<FloatWeights, bf16>},
      pair_kernels,
      {multiply<float, float>},
      {multiply<bf16, float>},
      {multiply<float, bf16>},
      {linear<float, float, float>},
      {linear<float, bf16, float>},
      {linear<float, bf16, bf16>},
      {linear_of_pairs<float>},
      {linear_of_pairs<bf16>},
      {add_bias_gelu<float>},
      {add_bias_gelu<bf16>},
  };
  return kernels;
}

}  // namespace blip_trace::cpu::BLIP_TRACE_ISA
