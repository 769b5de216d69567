// The kernels' launchers for ctypes: tests hand them pointers that torch would not make, to memory
// that ends where the kernels should stop.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdio>

#include "../../csrc/cuda/kernels.h"
#include "cuda_runtime.h"

namespace {

using namespace blip_trace::cuda;

// In a process of its own: where a kernel does what it may not, that process ends and one test
// fails. What a kernel writes there is seen in memory that processes share.
template <class Run>
int run_alone(Run run) {
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGABRT, SIG_DFL);
    std::signal(SIGSEGV, [](int) { emulator::fail("touches memory that is not for it."); });
    for (const int trap : {SIGILL, SIGTRAP})
      std::signal(trap, [](int) { emulator::fail("an address is no multiple of the size."); });
    _exit(run());
  }
  int status = -1;
  if (child > 0) waitpid(child, &status, 0);
  return status;
}

// Returns zero if all went well; if not, it has been said what went wrong.
template <class Arguments>
int run(const char* (*launcher)(const Arguments&, Stream), const void* arguments,
        std::size_t bytes, bool alone) {
  if (bytes != sizeof(Arguments)) {
    std::fprintf(stderr, "%zu bytes of arguments: kernels.h has %zu\n", bytes, sizeof(Arguments));
    return -1;
  }
  const auto run_here = [&] {
    const char* wrong = launcher(*static_cast<const Arguments*>(arguments), nullptr);
    if (wrong != nullptr) std::fprintf(stderr, "%s\n", wrong);
    return wrong == nullptr ? 0 : 1;
  };
  return alone ? run_alone(run_here) : run_here();
}

}  // namespace

#define BLIP_TRACE_LAUNCHER(name)                                                 \
  extern "C" __attribute__((visibility("default"))) int blip_trace_emulated_##name( \
      const void* arguments, std::size_t bytes, bool alone) {                     \
    return run(name, arguments, bytes, alone);                                    \
  }

BLIP_TRACE_LAUNCHER(attention)
BLIP_TRACE_LAUNCHER(attend_states)
BLIP_TRACE_LAUNCHER(add_norm)
BLIP_TRACE_LAUNCHER(bias_gelu)
BLIP_TRACE_LAUNCHER(fold_logits)
