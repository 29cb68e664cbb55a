// The small steps without a norm, compiled once for each instruction set: one pass over memory each way.
//
// A result is a function of its element or group alone, and sums have an order that only sizes and the instruction set
// decide: neither threads nor the position in memory change a bit.
#ifndef SAE_ISA
#define SAE_ISA baseline
#endif

#include "step_loops.h"

namespace sae {
namespace SAE_ISA {
namespace {

// ---- element by element

// f(in, out) maps kIn vectors to kOut.
template <int kIn, int kOut, class F>
SAE_INLINE void pointwise(const Pointwise& a, int64_t begin, int64_t end, F f) {
  with(a.type, a.stream, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    const int64_t first = begin * kChunk, n = (end * kChunk < a.size ? end * kChunk : a.size) - first;
    const T* in[kIn];
    T* out[kOut];
    for (int k = 0; k < kIn; ++k) in[k] = static_cast<const T*>(a.in[k]) + first;
    for (int k = 0; k < kOut; ++k) out[k] = static_cast<T*>(a.out[k]) + first;
    vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      Vec x[kIn], y[kOut];
      for (int k = 0; k < kIn; ++k) x[k] = get(in[k] + i, m);
      f(x, y);
      for (int k = 0; k < kOut; ++k) put(out[k] + i, y[k], m, a.stream);
    });
  });
}

void silu(const Pointwise& a, float*, int64_t begin, int64_t end) {
  pointwise<1, 1>(a, begin, end,
                  [](const Vec* x, Vec* y) __attribute__((always_inline)) { y[0] = silu_of(x[0]); });
}

void silu_backward(const Pointwise& a, float*, int64_t begin, int64_t end) {
  pointwise<2, 1>(a, begin, end,
                  [](const Vec* x, Vec* y) __attribute__((always_inline)) { y[0] = x[0] * silu_slope(x[1]); });
}

// factor[0] in[0] + factor[1] in[1], clamped where limit > 0; NaN stays NaN.
void sum(const Pointwise& a, float*, int64_t begin, int64_t end) {
  const Vec f = splat(a.factor[0]), g = splat(a.factor[1]), limit = splat(a.limit);
  if (a.limit > 0)
    pointwise<2, 1>(a, begin, end, [&](const Vec* x, Vec* y) __attribute__((always_inline)) {
      const Vec z = madd(x[1], g, x[0] * f);
      y[0] = z > limit ? limit : (z < -limit ? -limit : z);
    });
  else
    pointwise<2, 1>(a, begin, end, [&](const Vec* x, Vec* y) __attribute__((always_inline)) {
      y[0] = madd(x[1], g, x[0] * f);
    });
}

// factor[k] in[0] to out[k], or nothing where in[1] reached the limit.
template <int kOut>
SAE_INLINE void sum_gradients(const Pointwise& a, int64_t begin, int64_t end) {
  const Vec limit = splat(a.limit);
  if (a.limit > 0)
    pointwise<2, kOut>(a, begin, end, [&](const Vec* x, Vec* y) __attribute__((always_inline)) {
      const Int reached = (x[1] >= limit) | (x[1] <= -limit);
      for (int k = 0; k < kOut; ++k) y[k] = (reached ? Vec{} : x[0]) * splat(a.factor[k]);
    });
  else
    pointwise<1, kOut>(a, begin, end, [&](const Vec* x, Vec* y) __attribute__((always_inline)) {
      for (int k = 0; k < kOut; ++k) y[k] = x[0] * splat(a.factor[k]);
    });
}
void sum_backward(const Pointwise& a, float*, int64_t begin, int64_t end) {
  if (a.out[1]) sum_gradients<2>(a, begin, end);
  else sum_gradients<1>(a, begin, end);
}

// ---- mp_cat

void parts(const Parts& a, float*, int64_t begin, int64_t end) {
  with(a.type, a.stream, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    const int64_t row_size = a.part[0].size + a.part[1].size, chunks = (row_size + kPartChunk - 1) / kPartChunk;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / chunks, from = task % chunks * kPartChunk;
      int64_t at = 0;  // of this part in the row
      for (const Part& part : a.part) {
        const int64_t first = from > at ? from - at : 0;
        const int64_t last = from + kPartChunk - at < part.size ? from + kPartChunk - at : part.size;
        const T* in = static_cast<const T*>(part.in) + row * part.in_row + first;
        T* out = static_cast<T*>(part.out) + row * part.out_row + first;
        const Vec factor = splat(part.factor);
        vectors(last - first, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
          put(out + i, get(in + i, m) * factor, m, a.stream);
        });
        at += part.size;
      }
    }
  });
}

// ---- modulated_silu

// Tasks are groups where a group has one scale, else pixels.
void modulate(const Modulation& a, float*, int64_t begin, int64_t end) {
  with(a.type, a.stream, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    const int64_t n = a.channels == 1 ? a.pixels : a.channels;
    const T* x = static_cast<const T*>(a.x) + begin * n;
    T* out = static_cast<T*>(a.out) + begin * n;
    for (int64_t row = begin; row < end; ++row, x += n, out += n) {
      if (a.channels == 1) {
        const Vec scale = splat(a.scale[row]);
        vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
          put(out + i, silu_of(get(x + i, m) * scale), m, a.stream);
        });
      } else {
        const float* const scale = a.scale + row / a.pixels * n;
        vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
          put(out + i, silu_of(get(x + i, m) * get(scale + i, m)), m, a.stream);
        });
      }
    }
  });
}

// Tasks are groups. `scratch` holds two rows of sums over pixels: of some, then of all.
void modulate_backward(const Modulation& a, float* scratch, int64_t begin, int64_t end) {
  with(a.type, a.stream, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    const int64_t pixels = a.pixels, n = a.channels;
    // The gradient of z = scale x; that of x is written.
    const auto slope = [&](int64_t at, Vec scale, Vec x, int64_t m) __attribute__((always_inline)) {
      const Vec dz = get(static_cast<const T*>(a.grad) + at, m) * silu_slope(x * scale);
      if (a.out) put(static_cast<T*>(a.out) + at, dz * scale, m, a.stream);
      return dz;
    };
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * pixels * n;
      const T* const x = static_cast<const T*>(a.x) + first;
      if (n == 1) {
        const Vec scale = splat(a.scale[group]);
        Vec sum = {};
        for (int64_t p = 0; p < pixels; p += kSection)
          sum = sum + sum_over(pixels - p < kSection ? pixels - p : kSection,
                               [&](Vec part, int64_t i, int64_t m) __attribute__((always_inline)) {
                                 const Vec some = get(x + p + i, m);
                                 return madd(slope(first + p + i, scale, some, m), some, part);
                               });
        if (a.grad_scale) a.grad_scale[group] = total(sum);
        continue;
      }
      const float* const scale = a.scale + group * n;
      float *const sums = scratch, *const all = scratch + n;
      for (int64_t i = 0; i < 2 * n; ++i) scratch[i] = 0;
      for (int64_t p = 0; p < pixels; ++p) {
        vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
          const Vec some = get(x + p * n + i, m);
          const Vec dz = slope(first + p * n + i, get(scale + i, m), some, m);
          if (a.grad_scale) put(sums + i, madd(dz, some, get(sums + i, m)), m);
        });
        if (a.grad_scale && (p % 64 == 63 || p == pixels - 1))
          for (int64_t i = 0; i < n; ++i) {
            all[i] += sums[i];
            sums[i] = 0;
          }
      }
      if (a.grad_scale)
        for (int64_t i = 0; i < n; ++i) a.grad_scale[group * n + i] = all[i];
    }
  });
}

}  // namespace

extern const StepKernels step_kernels;
const StepKernels step_kernels = {silu, silu_backward, sum, sum_backward, parts, modulate, modulate_backward};

}  // namespace SAE_ISA
}  // namespace sae
