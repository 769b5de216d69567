#include "capability.h"

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace blip_trace::cpu {
namespace {

struct Build {
  const Kernels& (*table)();
  bool (*runs_here)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

// From the plainest to the best.
constexpr Build builds[] = {
    {isa_default::table, always},
#if defined(__x86_64__)
    {isa_avx2::table, has_avx2},
    {isa_avx512::table, has_avx512},
#endif
};

const Kernels* best() {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const Kernels* chosen = nullptr;
  for (const Build& build : builds) {
    if (!build.runs_here()) break;
    chosen = &build.table();
    if (limit != nullptr && std::string(limit) == chosen->name) break;
  }
  return chosen;
}

std::atomic<const Kernels*>& choice() {
  static std::atomic<const Kernels*> current{best()};
  return current;
}

}  // namespace

const Kernels& kernels() { return *choice().load(std::memory_order_relaxed); }

std::vector<std::string> available_capabilities() {
  std::vector<std::string> names;
  for (const Build& build : builds) {
    if (build.runs_here()) names.emplace_back(build.table().name);
  }
  return names;
}

std::vector<std::string> built_capabilities() {
  std::vector<std::string> names;
  for (const Build& build : builds) names.emplace_back(build.table().name);
  return names;
}

bool set_capability(const std::string& name) {
  for (const Build& build : builds) {
    if (name == build.table().name && build.runs_here()) {
      choice().store(&build.table());
      return true;
    }
  }
  return false;
}

bool has_bf16_products() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned avx512_bf16 = 1u << 5;  // leaf 7.1, eax
  constexpr unsigned amx_bf16 = 1u << 22;    // leaf 7.0, edx
  if (!has_avx512() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (edx & amx_bf16) return true;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & avx512_bf16);
#else
  return false;
#endif
}

}  // namespace blip_trace::cpu
