// The one random number generator: Philox4x32-10 on (element group, offset), key = seed, then Box-Muller.
//
// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The same source on host and device, with every
// fused multiply-add written out: where both have the instruction, their normals agree bit for bit. No branches, so
// loops over groups vectorise. Functions are static: each instruction set of the CPU build keeps its own.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SAE_INLINE static __host__ __device__ __forceinline__
#else
#define SAE_INLINE static inline __attribute__((always_inline))
#endif

namespace sae {

struct Words {
  uint32_t w0, w1, w2, w3;
};

// The four words of group `group` = element / 4.
SAE_INLINE Words philox(uint64_t group, uint64_t offset, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

SAE_INLINE float madd(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#elif defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
SAE_INLINE double madd(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#elif defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
SAE_INLINE uint32_t bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
#endif
}
SAE_INLINE float from_bits(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
#endif
}

// u in (0, 1] from a word: to fp32 (rounded), plus a half (rounded), times 2^-32.
SAE_INLINE float uniform(uint32_t w) { return (static_cast<float>(w) + 0.5f) * 0x1p-32f; }

// sqrt(-2 ln u). ln(m 2^e) = e ln 2 + ln m, m in [sqrt(1/2), sqrt(2)); the error of ln is below 0.6 units in the last
// place also where u is next to 1.
SAE_INLINE float radius(float u) {
  const uint32_t shifted = bits(u) - 0x3F3504F3u;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = from_bits((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = -0x1.38b4ccp-4f;
  p = madd(p, f, 0x1.055b46p-3f);
  p = madd(p, f, -0x1.0d8552p-3f);
  p = madd(p, f, 0x1.22da22p-3f);
  p = madd(p, f, -0x1.547244p-3f);
  p = madd(p, f, 0x1.99a008p-3f);
  p = madd(p, f, -0x1.000228p-2f);
  p = madd(p, f, 0x1.555554p-2f);
  const float f2 = f * f;
  // ln 2 in two parts; e times the first is exact, and what the sum with f rounds away is added back.
  const float head = e * 0x1.63p-1f, sum = head + f, lost = (head - sum) + f;
  const float tail = madd(f * f2, p, madd(-0.5f, f2, madd(e, -0x1.bd0106p-13f, lost)));
  const float log = sum + tail;
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(-2.0f * log);
#else
  return __builtin_sqrtf(-2.0f * log);
#endif
}

// One word of each group of a pair to the pair's two numbers.
SAE_INLINE void box_muller(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  const float r = radius(uniform(w0));
  // The angle is rounded to fp32, as in the reference; the reduction by multiples of pi / 2 (20 bits each) is exact.
  const float angle = uniform(w1) * 0x1.921fb6p+2f;
  const int32_t quadrant = static_cast<int32_t>(angle * 0x1.45f306p-1f + 0.5f);
  const float q = static_cast<float>(quadrant);
  const float a = ((angle - q * 0x1.921fap+0f) - q * 0x1.54442p-20f) - q * 0x1.a308d4p-41f;
  const float a2 = a * a;
  float s = madd(-0x1.994dd6p-13f, a2, 0x1.11075ep-7f);
  s = madd(s, a2, -0x1.555546p-3f);
  s = madd(s * a2, a, a);
  float c = madd(0x1.9a0192p-16f, a2, -0x1.6c0c8ap-10f);
  c = madd(c, a2, 0x1.55554ap-5f);
  const float half = 0.5f * a2, top = 1.0f - half;
  c = top + madd(c * a2, a2, (1.0f - top) - half);
  const bool odd = quadrant & 1;
  const float cosine = odd ? s : c, sine = odd ? c : s;
  z0 = r * from_bits(bits(cosine) ^ (static_cast<uint32_t>((quadrant + 1) & 2) << 30));
  z1 = r * from_bits(bits(sine) ^ (static_cast<uint32_t>(quadrant & 2) << 30));
}

}  // namespace sae
