// A vector of floats as wide as the instruction set's registers, and the functions the kernels need
// on it. Written with the compilers' vector extension, so that one text serves every instruction
// set.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define BLIP_TRACE_INLINE inline __attribute__((always_inline))

namespace blip_trace::cpu::BLIP_TRACE_ISA {

using std::int64_t;

constexpr int64_t width = BLIP_TRACE_VECTOR_FLOATS;

typedef float Vec __attribute__((vector_size(width * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(width * 4)));
typedef std::uint32_t BitVec __attribute__((vector_size(width * 4)));
typedef std::uint16_t HalfVec __attribute__((vector_size(width * 2)));

constexpr float infinity = __builtin_inff();

BLIP_TRACE_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
BLIP_TRACE_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

BLIP_TRACE_INLINE Vec splat(float x) { return x - Vec{}; }

BLIP_TRACE_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

BLIP_TRACE_INLINE Vec load(const bf16* p) {
  HalfVec half;
  __builtin_memcpy(&half, p, sizeof(half));
  return reinterpret_cast<Vec>(__builtin_convertvector(half, BitVec) << 16);
}

// The bits as they are.
BLIP_TRACE_INLINE Vec load(const Pair* p) { return load(reinterpret_cast<const float*>(p)); }

BLIP_TRACE_INLINE float load_scalar(const float* p) { return *p; }

BLIP_TRACE_INLINE float load_scalar(const bf16* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(p->bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

BLIP_TRACE_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

// Rounds to nearest even; a NaN stays one.
BLIP_TRACE_INLINE void store(bf16* p, Vec v) {
  const BitVec bits = reinterpret_cast<BitVec>(v);
  const BitVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitVec nan = BitVec{} + 0x7fc0u;
  const HalfVec half = __builtin_convertvector(v == v ? rounded : nan, HalfVec);
  __builtin_memcpy(p, &half, sizeof(half));
}

// The first n < width elements, zeros behind them.
template <class T>
BLIP_TRACE_INLINE Vec load_part(const T* p, int64_t n) {
  T part[width] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  return load(part);
}

template <class T>
BLIP_TRACE_INLINE void store_part(T* p, Vec v, int64_t n) {
  T part[width];
  store(part, v);
  __builtin_memcpy(p, part, n * sizeof(T));
}

// The larger of the two; b where one of them is NaN.
BLIP_TRACE_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  // Of the plain form g++ 12 warns inside its own header (GCC bug 105593); this one compiles to the
  // same.
  return reinterpret_cast<Vec>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
  return reinterpret_cast<Vec>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__SSE__)
  return reinterpret_cast<Vec>(
      _mm_max_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}

// Lane i is lane `lanes[i]` of a and b side by side.
BLIP_TRACE_INLINE Vec shuffle(Vec a, Vec b, IntVec lanes) {
#if defined(__clang__)
  Vec result;
  for (int64_t i = 0; i < width; ++i)
    result[i] = lanes[i] < width ? a[lanes[i]] : b[lanes[i] - width];
  return result;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Calls combine(a, b) on the halves of `v`, of that half, and so on down to one element.
template <class V, class F>
BLIP_TRACE_INLINE float reduce(V v, F combine) {
  constexpr int64_t half = sizeof(V) / sizeof(float) / 2;
  if constexpr (half == 1) {
    return combine(v[0], v[1]);
  } else {
    typedef float Half __attribute__((vector_size(half * 4)));
    Half parts[2];
    __builtin_memcpy(parts, &v, sizeof(v));
    return reduce(combine(parts[0], parts[1]), combine);
  }
}

BLIP_TRACE_INLINE float sum_of(Vec v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}

BLIP_TRACE_INLINE float maximum_of(Vec v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// 2^x for x <= 127, relative error 1.3e-7; NaN for NaN. Below -100 it is 2^-100, nothing next to a
// sum that holds a 1, and far enough from the subnormal numbers, on which some processors are very
// slow. x = n + r; 2^r is a polynomial of degree 5, by Remez exchange on |r| <= 1/2 for the
// relative error (7e-8 before rounding). Adding the large constant rounds to an integer and leaves
// n + 127 in the low bits, from where it becomes the exponent of a factor (a factor, because NaN
// times anything is NaN).
BLIP_TRACE_INLINE Vec exp2_of(Vec x) {
  constexpr float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23 and the bias of the exponent
  x = maximum(splat(-100.0f), x);
  const Vec shifted = x + shift;
  const Vec r = x - (shifted - shift);
  Vec p = r * 0.00132764725f + 0.00967554096f;
  p = p * r + 0.05550713092f;
  p = p * r + 0.24022120237f;
  p = p * r + 0.69314694405f;
  p = p * r + 1.00000011921f;
  return p * reinterpret_cast<Vec>(reinterpret_cast<BitVec>(shifted) << 23);
}

constexpr float log2_of_e = 1.44269504f;

// x Phi(x), Phi the normal distribution function: max(x, 0) - |x| Phi(-|x|), Phi(-a) = exp(-a^2 /
// 2) p(t), t = 1 / (1 + 0.225 a). p is the weighted least maximum (Lawson's iteration, weight
// exp(-a^2 / 2), a up to 6.5); absolute error 1e-7. The product vanishes before a = 14, where a is
// held so that infinity gives 0 too.
BLIP_TRACE_INLINE Vec gelu_of(Vec x) {
  const Vec positive = x > 0.0f ? x : Vec{};
  const Vec a = -maximum(splat(-14.0f), -maximum(x, -x));
  const Vec t = 1.0f / (a * 0.225f + 1.0f);
  Vec p = t * 0.7873265f - 1.4971533f;
  p = p * t + 1.6907262f;
  p = p * t - 0.7970857f;
  p = p * t + 0.34705529f;
  p = p * t - 0.030868985f;
  return positive - a * p * exp2_of(a * a * (-0.5f * log2_of_e));
}

}  // namespace blip_trace::cpu::BLIP_TRACE_ISA
