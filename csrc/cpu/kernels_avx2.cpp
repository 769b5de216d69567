#define BLIP_TRACE_ISA isa_avx2
#define BLIP_TRACE_ISA_NAME "avx2"
#define BLIP_TRACE_VECTOR_FLOATS 8
#define BLIP_TRACE_PANEL_VECTORS 2
#include "kernels_impl.h"
