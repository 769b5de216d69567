#define BLIP_TRACE_ISA isa_avx512
#define BLIP_TRACE_ISA_NAME "avx512"
#define BLIP_TRACE_VECTOR_FLOATS 16
#define BLIP_TRACE_PANEL_VECTORS 4
#include "kernels_impl.h"
