// All kernels for one instruction set: included once by each kernels_<name>.cpp, which defines
//   BLIP_TRACE_ISA            the namespace
//   BLIP_TRACE_ISA_NAME       its name, as in ATEN_CPU_CAPABILITY
//   BLIP_TRACE_VECTOR_FLOATS  floats in a vector register
//   BLIP_TRACE_PANEL_VECTORS  vectors side by side in a tile of a product
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
      {attend<float>},
      {attend<bf16>},
      {multiply<float, float>},
      {multiply<bf16, float>},
      {multiply<float, bf16>},
      {linear<float>},
      {linear<bf16>},
      {add_bias_gelu<float>},
      {add_bias_gelu<bf16>},
  };
  return kernels;
}

}  // namespace blip_trace::cpu::BLIP_TRACE_ISA
