#define BLIP_TRACE_ISA isa_avx512_bf16
#define BLIP_TRACE_ISA_NAME "avx512_bf16"
#define BLIP_TRACE_VECTOR_FLOATS 16
#define BLIP_TRACE_PANEL_VECTORS 4
#define BLIP_TRACE_BF16_PRODUCTS 1
#include "kernels_impl.h"
