#define BLIP_TRACE_ISA isa_default
#define BLIP_TRACE_ISA_NAME "default"
#define BLIP_TRACE_VECTOR_FLOATS 4
#define BLIP_TRACE_PANEL_VECTORS 2
#include "kernels_impl.h"
