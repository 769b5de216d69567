// The threads of a block as fibers. A block's warps run one after the other, each until all its
// threads wait for the block or have ended; within a warp the threads run one after the other, each
// until it waits for the warp.

// A checked longjmp takes a change of stacks for an error.
#undef _FORTIFY_SOURCE

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

// Of a block on sm_90, and what it gets without asking.
constexpr std::size_t most_shared = 227 * 1024, shared_unasked = 48 * 1024;
constexpr std::size_t guard_bytes = 1024;

}  // namespace

namespace blip_trace::cuda {

alignas(128) unsigned char shared_memory[most_shared + guard_bytes];

}  // namespace blip_trace::cuda

namespace emulator {
namespace {

using blip_trace::cuda::shared_memory;

constexpr std::size_t stack_bytes = 128 * 1024, largest_exchange = 64;
constexpr const char* at_block = "__syncthreads";
constexpr const char* at_end = "its end";

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes, filled;
};

struct Fiber {
  std::unique_ptr<std::byte[]> stack{new std::byte[stack_bytes]};
  jmp_buf state;
  uint3 index;
  const char* where;  // it waits, or `at_end`
  std::vector<std::vector<Copy>> copies;  // groups; the last is not committed yet
};

struct Warp {
  // What threads hand to each other. A thread writes for the next meeting while others still read
  // of the last one: two places, in turn.
  alignas(16) std::byte handed[2][warp_size][largest_exchange];
  int turn;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Fiber* running = nullptr;
Warp* running_warp = nullptr;
jmp_buf scheduler;
const std::function<void()>* thread_of_kernel;

int chosen_order = 0;
std::mt19937 random_order;
std::map<const void*, std::size_t> allowed_shared;

std::vector<unsigned> order(unsigned count) {
  std::vector<unsigned> turns(count);
  std::iota(turns.begin(), turns.end(), 0u);
  if (chosen_order == 1) std::reverse(turns.begin(), turns.end());
  if (chosen_order > 1 || chosen_order < 0)
    std::shuffle(turns.begin(), turns.end(), random_order);
  return turns;
}

void wait(const char* where) {
  running->where = where;
  if (_setjmp(running->state) == 0) _longjmp(scheduler, 1);
}

// A fiber outlives its thread and takes up another one.
void run_threads() {
  for (;;) {
    (*thread_of_kernel)();
    wait(at_end);
  }
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) == 0) _longjmp(fiber.state, 1);
}

void add_fiber() {
  fibers.push_back(std::make_unique<Fiber>());
  Fiber& fiber = *fibers.back();
  running = &fiber;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(
      &context,
      [] {
        wait(at_end);
        run_threads();
      },
      0);
  if (_setjmp(scheduler) == 0) setcontext(&context);
}

[[noreturn]] void fail_at(const std::string& where, const std::string& sentence) {
  std::fprintf(stderr, "emulator: block (%u, %u, %u), %s: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               where.c_str(), sentence.c_str());
  std::abort();
}

// That all of these wait at the same place; returns which.
const char* meeting_place(const std::vector<const Fiber*>& of, const std::string& whose) {
  for (const Fiber* fiber : of) {
    if (std::strcmp(fiber->where, of.front()->where) == 0) continue;
    const auto describe = [](const Fiber* f) {
      const unsigned n = f->index.x + blockDim.x * (f->index.y + blockDim.y * f->index.z);
      return "thread " + std::to_string(n) + " is at " + f->where;
    };
    fail_at(whose, "a barrier is not reached by all threads: " + describe(of.front()) + ", " +
                       describe(fiber) + ".");
  }
  return of.front()->where;
}

// Until all its threads wait for the block or have ended.
const char* run_warp(unsigned warp) {
  running_warp = &warps[warp];
  std::vector<const Fiber*> members;
  for (unsigned lane = 0; lane < warp_size; ++lane)
    members.push_back(fibers[warp * warp_size + lane].get());
  for (;;) {
    for (const unsigned lane : order(warp_size)) resume(*fibers[warp * warp_size + lane]);
    const char* where = meeting_place(members, "warp " + std::to_string(warp));
    if (where == at_block || where == at_end) return where;
    running_warp->turn ^= 1;
  }
}

void run_block(unsigned threads, std::size_t shared_bytes) {
  std::memset(shared_memory, 0xff, shared_bytes + guard_bytes);
  std::vector<const Fiber*> firsts;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    const unsigned x = i % blockDim.x, rest = i / blockDim.x;
    fiber.index = {x, rest % blockDim.y, rest / blockDim.y};
    fiber.copies.assign(1, {});
    if (i % warp_size == 0) firsts.push_back(&fiber);
  }
  do {
    for (const unsigned warp : order(threads / warp_size)) run_warp(warp);
  } while (meeting_place(firsts, "all warps") == at_block);
  const unsigned char* guard = shared_memory + shared_bytes;
  if (std::any_of(guard, guard + guard_bytes, [](unsigned char byte) { return byte != 0xff; }))
    fail_at("all warps", "shared memory behind the " + std::to_string(shared_bytes) +
                             " bytes of the launch was written to.");
}

}  // namespace

void set_order(int order) {
  chosen_order = order;
  random_order.seed(static_cast<unsigned>(order));
}

void fail(const char* sentence) {
  const unsigned n = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  fail_at("thread " + std::to_string(n), sentence);
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > most_shared) return cudaErrorInvalidValue;
  allowed_shared[kernel] = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const dim3 grid = config.gridDim, block = config.blockDim;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  const auto allowed = allowed_shared.find(kernel);
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > 1024 || block.z > 64)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes >
      std::max(shared_unasked, allowed == allowed_shared.end() ? 0 : allowed->second))
    return cudaErrorInvalidValue;
  gridDim = grid;
  blockDim = block;
  if (threads % warp_size != 0) fail("a block must be of whole warps.");
  while (fibers.size() < threads) add_fiber();
  warps.resize(threads / warp_size);
  thread_of_kernel = &thread;
  for (const unsigned n : order(static_cast<unsigned>(blocks))) {
    blockIdx = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    run_block(static_cast<unsigned>(threads), config.dynamicSmemBytes);
  }
  return cudaSuccess;
}

void meet_block() { wait(at_block); }

int lane() {
  const unsigned n = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  return static_cast<int>(n % warp_size);
}

void meet_warp(const void* mine, std::size_t bytes, void* all, const char* where) {
  if (bytes > largest_exchange) fail("a thread hands too much to its warp.");
  auto& handed = running_warp->handed[running_warp->turn];
  std::memcpy(handed[lane()], mine, bytes);
  wait(where);
  for (int i = 0; i < warp_size; ++i)
    std::memcpy(static_cast<std::byte*>(all) + i * bytes, handed[i], bytes);
}

void copy_later(void* to, const void* from, std::size_t bytes, std::size_t filled) {
  running->copies.back().push_back({to, from, bytes, filled});
}

void commit_copies() { running->copies.emplace_back(); }

void wait_for_copies(std::size_t open) {
  auto& groups = running->copies;
  const std::size_t committed = groups.size() - 1, done = committed - std::min(committed, open);
  for (std::size_t i = 0; i < done; ++i) {
    for (const Copy& copy : groups[i]) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<std::byte*>(copy.to) + copy.bytes, 0, copy.filled - copy.bytes);
    }
  }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace emulator

// For tests that load a library with emulated kernels.
extern "C" __attribute__((visibility("default"))) void blip_trace_emulator_set_order(int order) {
  emulator::set_order(order);
}
