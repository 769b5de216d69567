// What csrc/cuda/ptx/tensor_cores.cuh holds, on the CPU. Here a thread's part of a matrix is worked
// out element by element from the PTX ISA's formulas, not taken over from that file or the kernels:
// where they disagree, results are wrong.
#pragma once

#include "cuda_bf16.h"
#include "cuda_runtime.h"

namespace blip_trace::cuda::ptx {

using Registers = std::array<std::uint32_t, 4>;

inline void check_place(const void* place, const char* sentence) {
  if (reinterpret_cast<std::uintptr_t>(place) % 16 != 0) emulator::fail(sentence);
}

inline void copy_16(void* shared, const void* global, bool there) {
  check_place(shared, "cp.async copies to a place that 16 does not divide.");
  if (there) check_place(global, "cp.async copies from a place that 16 does not divide.");
  // They may arrive at once or as late as they are waited for: what was here is lost already.
  std::memset(shared, 0xff, 16);
  emulator::copy_later(shared, global, there ? 16 : 0, 16);
}

inline void end_copy_group() { emulator::commit_copies(); }

template <int open>
void wait_for_copies() {
  emulator::wait_for_copies(open);
}

// Element `low`, and in the upper half `high`, of 16-bit elements.
inline std::uint32_t word_of(std::uint16_t low, std::uint16_t high) {
  return low | static_cast<std::uint32_t>(high) << 16;
}

inline void load_matrices_as(std::uint32_t (&to)[4], const void* row, bool transposed) {
  check_place(row, "ldmatrix reads a row at a place that 16 does not divide.");
  // A row is read when its thread comes by: nothing says that others have written it before.
  std::array<std::uint16_t, 8> elements;
  std::memcpy(elements.data(), row, sizeof(elements));
  const auto rows = emulator::all_of_warp(elements, "ldmatrix");
  const int of_four = emulator::lane() / 4, pair = emulator::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const auto* matrix = &rows[8 * i];
    to[i] = transposed ? word_of(matrix[pair][of_four], matrix[pair + 1][of_four])
                       : word_of(matrix[of_four][pair], matrix[of_four][pair + 1]);
  }
}

inline void load_matrices(std::uint32_t (&to)[4], const void* row) {
  load_matrices_as(to, row, false);
}

inline void load_transposed(std::uint32_t (&to)[4], const void* row) {
  load_matrices_as(to, row, true);
}

// Element i of a thread's registers.
template <class Parts>
float bf16_of(const Parts& registers, int i) {
  const std::uint32_t word = registers[i / 2];
  return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

// Sums are rounded to float32 after every product; a GPU's have other roundings of that size.
inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                         std::uint32_t b1) {
  struct Mine {
    Registers a;
    std::array<std::uint32_t, 2> b;
  };
  const auto all =
      emulator::all_of_warp(Mine{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "mma.sync");
  float a_matrix[16][16], b_matrix[16][8];
  for (int lane = 0; lane < emulator::warp_size; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a_matrix[row][col] = bf16_of(all[lane].a, i);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
      b_matrix[row][group] = bf16_of(all[lane].b, i);
    }
  }
  const int group = emulator::lane() >> 2, in_group = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, col = in_group * 2 + (i & 1);
    for (int k = 0; k < 16; ++k) c[i] += a_matrix[row][k] * b_matrix[k][col];
  }
}

inline std::uint32_t pair_of(float low, float high) {
  return word_of(__float2bfloat16_rn(low).bits, __float2bfloat16_rn(high).bits);
}

inline float exp2_of(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

}  // namespace blip_trace::cuda::ptx
