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

// Four columns of kLanes rows as four vectors: to[c * to_row + i] = from[i * from_row + c].
SAE_INLINE void store_columns(const float* from, int64_t from_row, float* to, int64_t to_row) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
// Masked, for the plain ones make GCC 12 warn of its own header.
#define SAE_UNPACK(half, kind, a, b) _mm512_maskz_unpack##half##_##kind(-1, a, b)
  using Floats = __m512;
  using Doubles = __m512d;
#elif defined(__AVX2__)
#define SAE_UNPACK(half, kind, a, b) _mm256_unpack##half##_##kind(a, b)
  using Floats = __m256;
  using Doubles = __m256d;
#else
#define SAE_UNPACK(half, kind, a, b) _mm_unpack##half##_##kind(a, b)
  using Floats = __m128;
  using Doubles = __m128d;
#endif
  // Vector i holds rows i, i + 4, ..., four numbers each; each quarter is then transposed by itself.
  Floats rows[4];
  for (int i = 0; i < 4; ++i) {
    const float* const row = from + i * from_row;
#if defined(__AVX512F__)
    rows[i] = _mm512_castps128_ps512(_mm_loadu_ps(row));
    rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(row + 4 * from_row), 1);
    rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(row + 8 * from_row), 2);
    rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(row + 12 * from_row), 3);
#elif defined(__AVX2__)
    rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * from_row), 1);
#else
    rows[i] = _mm_loadu_ps(row);
#endif
  }
  const Doubles low01 = (Doubles)SAE_UNPACK(lo, ps, rows[0], rows[1]);
  const Doubles low23 = (Doubles)SAE_UNPACK(lo, ps, rows[2], rows[3]);
  const Doubles high01 = (Doubles)SAE_UNPACK(hi, ps, rows[0], rows[1]);
  const Doubles high23 = (Doubles)SAE_UNPACK(hi, ps, rows[2], rows[3]);
  store(to, (Vec)SAE_UNPACK(lo, pd, low01, low23));
  store(to + to_row, (Vec)SAE_UNPACK(hi, pd, low01, low23));
  store(to + 2 * to_row, (Vec)SAE_UNPACK(lo, pd, high01, high23));
  store(to + 3 * to_row, (Vec)SAE_UNPACK(hi, pd, high01, high23));
#undef SAE_UNPACK
#else
  for (int c = 0; c < 4; ++c)
    for (int i = 0; i < kLanes; ++i) to[c * to_row + i] = from[i * from_row + c];
#endif
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
