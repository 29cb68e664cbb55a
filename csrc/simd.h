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
using Word = uint32_t __attribute__((vector_size(4 * kLanes)));
using Half = uint16_t __attribute__((vector_size(2 * kLanes)));

// What 16-bit floats are in memory; in registers everything is float.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

SAE_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SAE_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// As half.h rounds one number.
SAE_INLINE Vec widen(Half h, Bf16) { return (Vec)(__builtin_convertvector(h, Word) << 16); }
SAE_INLINE Half narrow(Vec x, Bf16) {
  const Word u = (Word)x, rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((Word)((u & 0x7FFFFFFFu) > 0x7F800000u ? (u >> 16) | 0x40u : rounded), Half);
}
SAE_INLINE Vec widen(Half h, F16) {
  const Word u = __builtin_convertvector(h, Word), rest = (u & 0x7FFFu) << 13;
  const Word finite = (Word)((Vec)rest * 0x1p112f);
  return (Vec)(((u & 0x8000u) << 16) | (Word)(rest >= 0x0F800000u ? rest | 0x7F800000u : finite));
}
SAE_INLINE Half narrow(Vec x, F16) {
  const Word u = (Word)x, magnitude = u & 0x7FFFFFFFu;
  const Word small = (Word)((Vec)magnitude + 0.5f) - 0x3F000000u;
  const Word normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const Word finite = magnitude < 0x38800000u ? small : normal;
  const Word special = magnitude > 0x7F800000u ? Word{} + 0x7E00u : Word{} + 0x7C00u;
  return __builtin_convertvector(((u >> 16) & 0x8000u) | (Word)(magnitude >= 0x477FF000u ? special : finite), Half);
}
template <class T>
SAE_INLINE Vec load(const T* p) {
  Half h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h, T{});
}
template <class T>
SAE_INLINE void store(T* p, Vec v) {
  const Half h = narrow(v, T{});
  __builtin_memcpy(p, &h, sizeof h);
}

// The first n < kLanes numbers, zeros after them. Calls, for tails inlined everywhere are most of the code.
template <class T>
__attribute__((noinline)) static Vec load_some(const T* p, int64_t n) {
  T part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
__attribute__((noinline)) static void store_some(T* p, Vec v, int64_t n) {
  T part[kLanes];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// Past the caches, to where a whole vector fits a cache line or half of one; `fence` before other threads read it.
template <class T>
SAE_INLINE void stream(T* p, Vec v) {
#if defined(__x86_64__)
  T part[kLanes];
  store(part, v);
  if constexpr (sizeof(part) == 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_loadu_si512(part));
#endif
  } else if constexpr (sizeof(part) == 32) {
#if defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(part)));
#endif
  } else if constexpr (sizeof(part) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_loadu_si128(reinterpret_cast<const __m128i*>(part)));
  } else {
    store(p, v);
  }
#else
  store(p, v);
#endif
}
SAE_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

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

SAE_INLINE Vec root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_sqrt_ps(-1, (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
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

// Sums of kLanes rows of kLanes numbers, in an order that is the same for each.
SAE_INLINE Vec totals(const float* rows) {
  float columns[kLanes * kLanes];
  for (int c = 0; c < kLanes; c += 4) store_columns(rows + c, kLanes, columns + c * kLanes, kLanes);
  Vec sums[4] = {};
  for (int c = 0; c < kLanes; c += 4)
    for (int i = 0; i < 4; ++i) sums[i] = sums[i] + load(columns + (c + i) * kLanes);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
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

// e^x for x <= 88 to one unit in the last place; below -86 it is 0, and NaN stays NaN.
SAE_INLINE Vec exp(Vec x) {
  // x = n ln 2 + f with n an integer in the low bits of `shifted`; n times the first part of ln 2 is exact.
  const Vec magic = splat(0x1.8p23f), shifted = madd(x, splat(0x1.715476p+0f), magic), n = shifted - magic;
  const Vec f = madd(n, splat(0x1.bd0106p-13f), madd(n, splat(-0x1.63p-1f), x));
  Vec p = splat(0x1.6a23d0p-10f);
  p = madd(p, f, splat(0x1.123a20p-7f));
  p = madd(p, f, splat(0x1.5558f2p-5f));
  p = madd(p, f, splat(0x1.555492p-3f));
  p = madd(p, f, splat(0x1.fffffcp-2f));
  p = madd(p, f * f, f) + splat(1.0f);
  const Vec scaled = (Vec)((Int)p + ((Int)shifted << 23));
  const Vec low = splat(-86.0f);
  return x >= low ? scaled : (x < low ? Vec{} : x);
}

// Neighbouring lanes change places.
SAE_INLINE Vec swap_pairs(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_permute_ps(-1, (__m512)v, 0xB1);
#elif defined(__AVX2__)
  return (Vec)_mm256_permute_ps((__m256)v, 0xB1);
#else
  return __builtin_shuffle(v, Int{1, 0, 3, 2});
#endif
}

}  // namespace simd
}  // namespace sae
