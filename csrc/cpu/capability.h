// Which build of the kernels runs on this machine.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace blip_trace::cpu {

// The chosen build: the best one that this processor runs, at most what ATEN_CPU_CAPABILITY allows.
const Kernels& kernels();

// Names of the builds that this processor runs, the best one last; and of all that were compiled.
std::vector<std::string> available_capabilities();
std::vector<std::string> built_capabilities();

// Chooses by name, for tests. Returns false for a name that is not available.
bool set_capability(const std::string& name);

// Whether the processor has tiles for bfloat16 products.
bool has_amx_bf16();

// Whether AMD made it.
bool is_amd();

}  // namespace blip_trace::cpu
