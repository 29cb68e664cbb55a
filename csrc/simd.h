// Vectors of floats of the widest kind that the instruction set of this compilation has.
//
// Everything is static or always inlined: the code of each instruction set keeps its own copy.
#pragma once

#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "half.h"

namespace sae {
namespace simd {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Vec = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));

SAE_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SAE_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

SAE_INLINE Vec splat(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

// a b + c, rounded once where the processor has the instruction.
SAE_INLINE Vec madd(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

SAE_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Over lanes in halves: always in the same order.
template <class Join>
SAE_INLINE float across(Vec v, Join join) {
  using Four = float __attribute__((vector_size(16)));
  Four part[kLanes / 4];
  __builtin_memcpy(part, &v, sizeof v);
  for (int n = kLanes / 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) part[i] = join(part[i], part[i + n]);
  return join(join(part[0][0], part[0][2]), join(part[0][1], part[0][3]));
}
SAE_INLINE float largest(Vec v) {
  return across(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}
SAE_INLINE float total(Vec v) {
  return across(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

// The lanes [begin, end) of v, and `other` in the rest.
SAE_INLINE Vec keep(Vec v, int64_t begin, int64_t end, float other) {
  Int lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Int from = Int{} + static_cast<int32_t>(begin), to = Int{} + static_cast<int32_t>(end);
  return (lane >= from) & (lane < to) ? v : splat(other);
}

// 2^x for x <= 127 to one unit in the last place; below 2^-125 it is 0, and NaN stays NaN.
SAE_INLINE Vec exp2(Vec x) {
  const Vec magic = splat(0x1.8p23f), shifted = x + magic, f = x - (shifted - magic);
  Vec p = splat(0x1.41d334p-13f);
  p = madd(p, f, splat(0x1.5f456ap-10f));
  p = madd(p, f, splat(0x1.3b2dbcp-7f));
  p = madd(p, f, splat(0x1.c6aed4p-5f));
  p = madd(p, f, splat(0x1.ebfbdap-3f));
  p = madd(p, f, splat(0x1.62e430p-1f));
  p = madd(p, f, splat(1.0f));
  const Vec scaled = (Vec)((Int)p + ((Int)shifted << 23));
  const Vec low = splat(-125.0f);
  return x >= low ? scaled : (x < low ? Vec{} : x);
}

}  // namespace simd
}  // namespace sae
