"""The emulator that stands in for a GPU: it must see what is wrong with a kernel, and else be like CUDA."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "cuda_emulator"

# Small kernels, one to a run: their name and the order of the threads are the program's arguments. What they
# write to `out` is printed.
SOURCE = r"""
#include <cuda_bf16.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "device.cuh"

using namespace blip_trace::cuda;

constexpr int threads = 96;

__device__ float* shared() { return reinterpret_cast<float*>(shared_memory); }

template <bool wait>
__global__ void reverse(float* out) {
  shared()[threadIdx.x] = threadIdx.x;
  if (wait) __syncthreads();
  out[threadIdx.x] = shared()[threads - 1 - threadIdx.x];
}

template <bool wait>
__global__ void reverse_warp(float* out) {
  const int lane = threadIdx.x % warp_size;
  shared()[threadIdx.x] = threadIdx.x;
  if (wait) __syncwarp();
  out[threadIdx.x] = shared()[threadIdx.x + warp_size - 1 - 2 * lane];
}

// The second value is written before all have read the first.
template <bool wait>
__global__ void overwrite(float* out) {
  shared()[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = shared()[threads - 1 - threadIdx.x];
  if (wait) __syncthreads();
  shared()[threadIdx.x] = 0;
}

__global__ void shuffle(float* out) {
  const float mine = threadIdx.x;
  out[threadIdx.x] = __shfl_xor_sync(whole_warp, mine, 5) + 1000 * __shfl_sync(whole_warp, mine, 3);
}

// Different numbers of shuffles in two warps, and a barrier of both in between.
__global__ void sums(float* out) {
  float x = threadIdx.x;
  for (unsigned i = 0; i <= threadIdx.x / warp_size; ++i) x = warp_sum(x);
  out[threadIdx.x] = team_sum<threads / warp_size>(x);
}

__global__ void every_thread(float* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * 64 + thread] += 1 + block * 64 + thread;
}

__global__ void unwritten(float* out) { out[threadIdx.x] = shared()[threadIdx.x]; }

__global__ void behind(float*) { shared()[threads] = 1; }

__global__ void some_leave(float*) {
  if (threadIdx.x >= 64) return;
  __syncthreads();
}

__global__ void lanes_leave(float*) {
  if (threadIdx.x % 2 == 0) return;
  __syncwarp();
}

__global__ void two_barriers(float*) {
  if (threadIdx.x % 2 == 0) warp_sum(1);
  else __syncwarp();
}

__global__ void half_a_warp(float*) { __syncwarp(0xffff); }

__global__ void copies(float* out) {
  alignas(16) static float from[4] = {1, 2, 3, 4};
  float* const to = shared() + 4 * threadIdx.x;
  emulator::copy_later(to, from, 8, 16);
  emulator::commit_copies();
  emulator::copy_later(to, from, 16, 16);
  emulator::commit_copies();
  const float before = to[0];
  emulator::wait_for_copies(1);
  const float first = to[1] * 10 + to[3];
  emulator::wait_for_copies(0);
  out[threadIdx.x] = before != before ? first * 10 + to[3] : -1;
}

__global__ void permuted(float* out) {
  out[threadIdx.x] = __byte_perm(0x03020100, 0x07060504, 0x5410) == 0x05040100 &&
                     __byte_perm(0x03020100, 0x07060504, 0x7632) == 0x07060302;
}

// Whole rows and groups of 0, 3, 0, 7 and 90 rows.
__global__ void groups(float* out) {
  const int32_t starts[] = {0, 0, 3, 3, 10, 100};
  out[threadIdx.x] = group_of(starts, 5, 100, threadIdx.x);
}

void unasked(float*) {}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  emulator::set_order(std::atoi(arguments[2]));
  if (name == "bf16") {
    float x;
    while (std::fread(&x, sizeof(x), 1, stdin) == 1) {
      const bf16 rounded = __float2bfloat16_rn(x);
      const float back = __bfloat162float(rounded);
      std::fwrite(&rounded, sizeof(rounded), 1, stdout);
      std::fwrite(&back, sizeof(back), 1, stdout);
    }
    return 0;
  }
  float written[32 * 64] = {};
  float* const out = written;
  const auto run = [&](auto kernel, dim3 grid = 1, dim3 block = threads) {
    return launch(kernel, grid, block, 4 * threads * sizeof(float), nullptr, out);
  };
  const char* wrong = "no kernel of this name";
  if (name == "reverse") wrong = run(reverse<true>);
  if (name == "reverse-unsynced") wrong = run(reverse<false>);
  if (name == "reverse_warp") wrong = run(reverse_warp<true>);
  if (name == "reverse_warp-unsynced") wrong = run(reverse_warp<false>);
  if (name == "overwrite") wrong = run(overwrite<true>);
  if (name == "overwrite-unsynced") wrong = run(overwrite<false>);
  if (name == "shuffle") wrong = run(shuffle);
  if (name == "sums") wrong = run(sums);
  if (name == "every_thread") wrong = run(every_thread, dim3(4, 2, 4), dim3(8, 4, 2));
  if (name == "unwritten") wrong = run(unwritten);
  if (name == "some_leave") wrong = run(some_leave);
  if (name == "lanes_leave") wrong = run(lanes_leave);
  if (name == "two_barriers") wrong = run(two_barriers);
  if (name == "half_a_warp") wrong = run(half_a_warp);
  if (name == "copies") wrong = run(copies);
  if (name == "permuted") wrong = run(permuted);
  if (name == "groups") wrong = run(groups);
  if (name == "part_of_a_warp") wrong = run(unasked, 1, 33);
  if (name == "large_block") wrong = run(unasked, 1, 1056);
  if (name == "high_grid") wrong = run(unasked, dim3(1, 65536));
  if (name == "no_block") wrong = run(unasked, 0);
  if (name == "behind") wrong = launch(behind, 1, threads, threads * sizeof(float), nullptr, out);
  if (name == "much_shared") wrong = launch(unasked, 1, 32, 227 * 1024, nullptr, out);
  if (name == "too_much_shared") wrong = launch(unasked, 1, 32, 227 * 1024 + 1, nullptr, out);
  if (name == "shared_unasked") {
    const cudaLaunchConfig_t config{1, 32, 48 * 1024 + 1, nullptr};
    wrong = cudaGetErrorString(cudaLaunchKernelEx(&config, unasked, out));
  }
  std::printf("%s\n", wrong == nullptr ? "fine" : wrong);
  for (const float x : written) std::printf("%g ", x);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.fail("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "kernels.cu").write_text(SOURCE)
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-I{EMULATOR}", f"-I{ROOT / 'csrc' / 'cuda'}", "-xc++", "-o", folder / "run"]
    command = [compiler, *flags, folder / "kernels.cu", EMULATOR / "emulator.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def run(program: Path, name: str, order: int = 0) -> tuple[str, list[float]]:
    """What a launch said, and what its kernel wrote."""
    done = subprocess.run([program, name, str(order)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, written = done.stdout.split("\n")
    return said, [float(x) for x in written.split()]


def refusal(program: Path, name: str) -> str:
    """What the emulator says where it ends the process."""
    done = subprocess.run([program, name, "0"], capture_output=True, text=True)
    assert done.returncode < 0
    assert done.stdout == ""
    return done.stderr


ORDERS = [0, 1, 2, 3]
REVERSED = [95 - i for i in range(96)]
REVERSED_WARPS = [i // 32 * 32 + 31 - i % 32 for i in range(96)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "expected"),
    [("reverse", REVERSED), ("overwrite", REVERSED), ("reverse_warp", REVERSED_WARPS)],
)
def test_order_shows_a_missing_barrier(program: Path, name: str, expected: list[int], order: int) -> None:
    said, written = run(program, name, order)
    assert said == "fine"
    assert written[:96] == expected
    others = [run(program, name + "-unsynced", other)[1][:96] for other in ORDERS]
    # A race may give the right answer in one order; it may not in all.
    assert any(other != expected for other in others)
    assert others[0] != others[1]


@pytest.mark.parametrize("order", ORDERS)
def test_values_of_other_threads(program: Path, order: int) -> None:
    shuffled = run(program, "shuffle", order)[1]
    assert shuffled[:96] == [(i ^ 5) + 1000 * (i // 32 * 32 + 3) for i in range(96)]
    # each further sum of a warp is of 32 equal values; `team_sum` begins with one
    sums = [sum(range(32 * w, 32 * w + 32)) * 32 ** (w + 1) for w in range(3)]
    assert run(program, "sums", order)[1][:96] == [pytest.approx(sum(sums), rel=1e-5)] * 96


@pytest.mark.parametrize("order", ORDERS)
def test_every_thread_of_every_block_runs_once(program: Path, order: int) -> None:
    assert run(program, "every_thread", order)[1] == [1 + i for i in range(32 * 64)]


def test_shared_memory_is_not_a_number_until_it_is_written(program: Path) -> None:
    assert all(math.isnan(x) for x in run(program, "unwritten")[1][:96])


@pytest.mark.parametrize("order", ORDERS)
def test_copies_arrive_when_they_are_waited_for(program: Path, order: int) -> None:
    # the first group: two elements and zeros behind them; the second: all four
    assert run(program, "copies", order)[1][:96] == [204] * 96


def test_small_functions(program: Path) -> None:
    assert run(program, "permuted")[1][:96] == [1] * 96
    assert run(program, "groups")[1][:96] == [1] * 3 + [3] * 7 + [4] * 86


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some_leave", "all warps: a barrier is not reached by all threads: thread 0 is at __syncthreads"),
        ("lanes_leave", "thread 0 is at its end, thread 1 is at __syncwarp"),
        ("two_barriers", "thread 0 is at __shfl_xor_sync, thread 1 is at __syncwarp"),
        ("half_a_warp", "thread 0: a part of a warp is named by a mask"),
        ("behind", "shared memory behind the 384 bytes of the launch was written to"),
        ("part_of_a_warp", "a block must be of whole warps"),
    ],
)
def test_what_ends_the_process(program: Path, name: str, message: str) -> None:
    said = refusal(program, name)
    assert said.startswith("emulator: block (0, 0, 0), ")
    assert message in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("large_block", "invalid configuration argument"),
        ("high_grid", "invalid configuration argument"),
        ("no_block", "invalid configuration argument"),
        ("shared_unasked", "invalid argument"),
        ("too_much_shared", "invalid argument"),
        ("much_shared", "fine"),
    ],
)
def test_launches_fail_where_they_would_on_a_gpu(program: Path, name: str, said: str) -> None:
    assert run(program, name)[0] == said


def test_bfloat16_rounds_as_torch_does(program: Path) -> None:
    torch.manual_seed(0)
    x = torch.cat((torch.randn(1000), torch.randn(1000) * 1e-39, torch.randn(1000) * 3e38))
    halves = torch.randint(0, 2**15, (1000,), dtype=torch.int32) * 2**16 + 2**15  # between two neighbors
    specials = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4e38, math.nan])
    x = torch.cat((x, halves.view(torch.float32), specials))
    done = subprocess.run([program, "bf16", "0"], input=x.numpy().tobytes(), capture_output=True, check=True)
    pairs = torch.frombuffer(bytearray(done.stdout), dtype=torch.bfloat16).view(-1, 3)
    rounded, back = pairs[:, 0], pairs[:, 1:].contiguous().view(torch.float32)[:, 0]
    expected = x.bfloat16()
    assert torch.equal(rounded.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(rounded[known].view(torch.int16), expected[known].view(torch.int16))
    assert torch.equal(back[known], expected[known].float())
    assert not torch.equal(back[known], x[known])
