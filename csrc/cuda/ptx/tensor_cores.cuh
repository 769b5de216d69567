// The instructions that C++ has no name for: asynchronous copies, matrices between shared memory
// and registers, the tensor cores' product and the processor's 2^x. All need sm_80. Whoever
// includes this file by its name in angle brackets gets these, or the emulator's of the same
// meaning (tests/cuda_emulator).
//
// Which element of a matrix a thread holds is fixed by the PTX ISA ("Matrix Fragments for
// mma.m16n8k16 with floating point type" and "ldmatrix"). With r = lane / 4 and c = 2 * (lane % 4),
// and a register of two bfloat16 holding the lower column, or for B the lower row, in its low half:
//
//   A [16, 16]   a[0]: row r,     columns c, c + 1      a[1]: row r + 8, columns c, c + 1
//                a[2]: row r,     columns c + 8, c + 9  a[3]: row r + 8, columns c + 8, c + 9
//   B [16, 8]    b0: rows c, c + 1 of column r          b1: rows c + 8, c + 9 of column r
//   C [16, 8]    c[0], c[1]: row r, columns c, c + 1    c[2], c[3]: row r + 8, the same columns
//
// A matrix of eight rows of eight, as they are loaded four at a time: row r, columns c and c + 1;
// transposed: column r, rows c and c + 1. Lanes 8 * i to 8 * i + 7 name the rows of matrix i.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace blip_trace::cuda::ptx {

__device__ __forceinline__ std::uint32_t address_of(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// Begins to copy 16 bytes, both places at a multiple of 16; where there is nothing to copy, zeros
// are written and `global` is not read.
__device__ __forceinline__ void copy_16(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address_of(shared)),
               "l"(global), "r"(there ? 16 : 0)
               : "memory");
}

// Copies begun since the last call are a group, perhaps an empty one.
__device__ __forceinline__ void end_copy_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's copies, but for those of its last `open` groups. Other threads see them
// after a barrier.
template <int open>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
}

// Four matrices of eight rows of eight 16-bit elements; `row`: in shared memory, at a multiple of
// 16 bytes.
__device__ __forceinline__ void load_matrices(std::uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address_of(row))
               : "memory");
}

__device__ __forceinline__ void load_transposed(std::uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address_of(row))
               : "memory");
}

// c += a b, a and b of bfloat16, c of float32.
__device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4],
                                             std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Both rounded to bfloat16, `low` in the low half.
__device__ __forceinline__ std::uint32_t pair_of(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2^x, relative error 2^-22; zero where that would be subnormal, NaN for NaN.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace blip_trace::cuda::ptx
