// The kernels' launchers for ctypes: tests hand them pointers that torch would not make, to memory
// that ends where the kernels should stop.
//
// A launch is a process of its own: where a kernel touches what it may not, that process ends and
// one test fails. What a kernel writes is seen in memory that processes share.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdio>

#include "../../csrc/cuda/kernels.h"
#include "cuda_runtime.h"

namespace {

using namespace blip_trace::cuda;

// Returns zero if all went well; if not, the process has said what went wrong.
template <class Arguments>
int run_alone(const char* (*launcher)(const Arguments&, Stream), const void* arguments,
              std::size_t bytes) {
  if (bytes != sizeof(Arguments)) {
    std::fprintf(stderr, "%zu bytes of arguments, and kernels.h has %zu\n", bytes,
                 sizeof(Arguments));
    return -1;
  }
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGABRT, SIG_DFL);
    std::signal(SIGSEGV, [](int) { emulator::fail("touches memory that is not for it."); });
    for (const int trap : {SIGILL, SIGTRAP})
      std::signal(trap, [](int) { emulator::fail("an address is no multiple of the size."); });
    const char* wrong = launcher(*static_cast<const Arguments*>(arguments), nullptr);
    if (wrong != nullptr) std::fprintf(stderr, "%s\n", wrong);
    _exit(wrong != nullptr);
  }
  int status = -1;
  if (child > 0) waitpid(child, &status, 0);
  return status;
}

}  // namespace

#define BLIP_TRACE_EXPORT extern "C" __attribute__((visibility("default"))) int

BLIP_TRACE_EXPORT blip_trace_emulated_attention(const void* arguments, std::size_t bytes) {
  return run_alone(attention, arguments, bytes);
}

BLIP_TRACE_EXPORT blip_trace_emulated_attend_states(const void* arguments, std::size_t bytes) {
  return run_alone(attend_states, arguments, bytes);
}

BLIP_TRACE_EXPORT blip_trace_emulated_add_norm(const void* arguments, std::size_t bytes) {
  return run_alone(add_norm, arguments, bytes);
}

BLIP_TRACE_EXPORT blip_trace_emulated_bias_gelu(const void* arguments, std::size_t bytes) {
  return run_alone(bias_gelu, arguments, bytes);
}

BLIP_TRACE_EXPORT blip_trace_emulated_fold_logits(const void* arguments, std::size_t bytes) {
  return run_alone(fold_logits, arguments, bytes);
}
