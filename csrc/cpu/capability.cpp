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
// A bit that CPUID returns: leaf 7 and its subleaf; registers count from eax.
bool has_feature(unsigned subleaf, unsigned which, unsigned bit) {
  unsigned registers[4] = {};
  return __get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2],
                           &registers[3]) &&
         (registers[which] >> bit & 1u);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && has_feature(1, 0, 5); }
#endif

// From the plainest to the best.
constexpr Build builds[] = {
    {isa_default::table, always},
#if defined(__x86_64__)
    {isa_avx2::table, has_avx2},
    {isa_avx512::table, has_avx512},
    {isa_avx512_bf16::table, has_avx512_bf16},
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

bool has_amx_bf16() {
#if defined(__x86_64__)
  return has_avx512() && has_feature(0, 3, 22);
#else
  return false;
#endif
}

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace blip_trace::cpu
