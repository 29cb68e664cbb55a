// What the loops of the small steps share. Like simd.h it belongs to the instruction set of each file that includes it.
#pragma once

#include "cpu_steps.h"
#include "simd.h"

#define SAE_MEMBER inline __attribute__((always_inline))

namespace sae {
namespace SAE_ISA {
namespace {

using namespace simd;

template <bool v>
struct Flag {
  static constexpr bool value = v;
};

// body(T{}) for the type of the tensors.
template <class Body>
SAE_INLINE void with(Type type, bool stream, Body body) {
  if (type == Type::f32) body(0.0f);
  else if (type == Type::bf16) body(Bf16{});
  else body(F16{});
  if (stream) fence();
}

template <class T>
SAE_INLINE Vec get(const T* p, int64_t m) {
  return m >= kLanes ? load(p) : load_some(p, m);
}
// A branch for each vector: as a template argument `past` doubled the code, and bought nothing.
template <class T>
SAE_INLINE void put(T* p, Vec v, int64_t m, bool past = false) {
  if (m < kLanes) store_some(p, v, m);
  else if (past) stream(p, v);
  else store(p, v);
}

// body(i, m) for vectors that begin at i and hold m numbers of n.
template <class Body>
SAE_INLINE void vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, int64_t{kLanes});
  if (i < n) body(i, n - i);
}

// Longer sums are sums of sections, which round less.
constexpr int64_t kSection = 4096;

// A vector that holds the sum over n <= kSection numbers in parts: add(sum, i, m) adds a vector of them.
template <class Add>
SAE_INLINE Vec sum_over(int64_t n, Add add) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sums[u] = add(sums[u], i + u * kLanes, int64_t{kLanes});
  for (; i < n; i += kLanes) sums[0] = add(sums[0], i, n - i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The sums of up to kLanes rows of n numbers: add(sum, r, i, m) adds a vector of row r.
template <class Add>
SAE_INLINE Vec sums_of_rows(int64_t rows, int64_t n, Add add) {
  alignas(64) float sums[kLanes * kLanes];
  for (int r = 0; r < kLanes; ++r) store(sums + r * kLanes, Vec{});
  for (int64_t p = 0; p < n; p += kSection) {
    const int64_t size = n - p < kSection ? n - p : kSection;
    for (int64_t r = 0; r < rows; ++r)
      store(sums + r * kLanes,
            load(sums + r * kLanes) + sum_over(size, [&](Vec sum, int64_t i, int64_t m) __attribute__((always_inline)) {
              return add(sum, r, p + i, m);
            }));
  }
  return totals(sums);
}

// mp_silu: x sigmoid(x) / 0.596.
constexpr float kGain = 1 / 0.596;

struct Sigmoid {
  Vec value, rest;  // sigmoid(x), 1 - sigmoid(x)
};
SAE_INLINE Sigmoid sigmoid(Vec x) {
  const Vec e = exp((Vec)((Int)x | INT32_MIN)), large = splat(1.0f) / (e + splat(1.0f)), small = e * large;
  const Int positive = x >= Vec{};
  return {positive ? large : small, positive ? small : large};
}
SAE_INLINE Vec silu_of(Vec x) { return x * sigmoid(x).value * splat(kGain); }
SAE_INLINE Vec silu_slope(Vec x) {
  const Sigmoid s = sigmoid(x);
  return s.value * madd(x, s.rest, splat(1.0f)) * splat(kGain);
}

}  // namespace
}  // namespace SAE_ISA
}  // namespace sae
