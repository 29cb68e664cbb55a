// pixel_norm, pixel_norm_silu and qk_prepare, compiled once for each instruction set: one pass over memory each way.
//
// A result is a function of its row alone, and sums have an order that only sizes and the instruction set decide: neither
// threads nor the position in memory change a bit.
#ifndef SAE_ISA
#define SAE_ISA baseline
#endif

#include "step_loops.h"

namespace sae {
namespace SAE_ISA {
namespace {

// ---- pixel_norm, pixel_norm_silu

// grad / (rms + eps) - y <grad, y> / (n rms) = grad across + y along.
struct Slopes {
  Vec across, along;
};
SAE_INLINE Slopes slopes_of(Vec rms, Vec dot, float eps, int64_t n) {
  // The norm has gradient zero at the origin, by autograd's convention.
  const Vec along = rms == Vec{} ? Vec{} : -dot / (rms * splat(static_cast<float>(n)));
  return {splat(1.0f) / (rms + splat(eps)), along};
}

// The tensors of a call at an offset; kAct: with mp_silu of the result, or its gradient.
template <class T, bool kAct>
struct NormAt {
  const T *x, *grad, *grad_act;
  T *out, *act;
  bool stream;

  explicit NormAt(const Norm& a, int64_t at)
      : x(static_cast<const T*>(a.x) + at),
        grad(static_cast<const T*>(a.grad) + at),
        grad_act(static_cast<const T*>(a.grad_act) + at),
        out(static_cast<T*>(a.out) + at),
        act(static_cast<T*>(a.act) + at),
        stream(a.stream) {}

  SAE_MEMBER void write(int64_t i, Vec y, int64_t m) const {
    put(out + i, y, m, stream);
    if constexpr (kAct) put(act + i, silu_of(y), m, stream);
  }
  // The gradient of the normalised y.
  SAE_MEMBER Vec gradient(int64_t i, Vec y, int64_t m) const {
    const Vec direct = get(grad + i, m);
    if constexpr (kAct) return madd(get(grad_act + i, m), silu_slope(y), direct);
    return direct;
  }
};

// Rows of channels: tasks are norm_rows() of them, kLanes at a time, whose square roots and quotients are one vector.
template <class T, bool kAct>
__attribute__((noinline)) void norm_rows_forward(const Norm& a, int64_t first, int64_t count) {
  const int64_t n = a.size;
  const NormAt<T, kAct> at(a, first * n);
  const Vec squares = sums_of_rows(count, n, [&](Vec sum, int64_t r, int64_t i, int64_t m)
                                                 __attribute__((always_inline)) {
    const Vec some = get(at.x + r * n + i, m);
    return madd(some, some, sum);
  });
  const Vec rms = root(squares / splat(static_cast<float>(n)));
  put(a.rms + first, rms, count);
  alignas(64) float scales[kLanes];
  store(scales, splat(1.0f) / (rms + splat(a.eps)));
  for (int64_t r = 0; r < count; ++r) {
    const Vec scale = splat(scales[r]);
    vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      at.write(r * n + i, get(at.x + r * n + i, m) * scale, m);
    });
  }
}

// `scratch` holds kLanes rows.
template <class T, bool kAct>
__attribute__((noinline)) void norm_rows_backward(const Norm& a, float* scratch, int64_t first, int64_t count) {
  const int64_t n = a.size;
  const NormAt<T, kAct> at(a, first * n);
  const Vec dots = sums_of_rows(count, n, [&](Vec sum, int64_t r, int64_t i, int64_t m)
                                              __attribute__((always_inline)) {
    const Vec y = get(at.x + r * n + i, m), grad = at.gradient(r * n + i, y, m);
    if constexpr (kAct) put(scratch + r * n + i, grad, m);
    return madd(grad, y, sum);
  });
  const Slopes s = slopes_of(get(a.rms + first, count), dots, a.eps, n);
  alignas(64) float across[kLanes], along[kLanes];
  store(across, s.across);
  store(along, s.along);
  for (int64_t r = 0; r < count; ++r) {
    const Vec grad_factor = splat(across[r]), y_factor = splat(along[r]);
    vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      Vec grad;
      if constexpr (kAct) grad = get(scratch + r * n + i, m);
      else grad = get(at.grad + r * n + i, m);
      put(at.out + r * n + i, madd(get(at.x + r * n + i, m), y_factor, grad * grad_factor), m, a.stream);
    });
  }
}

// body(first, count) for the rows of tasks [begin, end), at most kLanes at a time.
template <class Body>
SAE_INLINE void row_blocks(const Norm& a, int64_t begin, int64_t end, Body body) {
  const int64_t last = end * norm_rows(a.size) < a.outer ? end * norm_rows(a.size) : a.outer;
  for (int64_t row = begin * norm_rows(a.size); row < last;) {
    const int64_t most = norm_rows(a.size) < kLanes ? norm_rows(a.size) : kLanes;
    const int64_t count = last - row < most ? last - row : most;
    body(row, count);
    row += count;
  }
}

// Channels apart from each other: tasks are tiles of pixels, whose channels are kept in `scratch` (tile values of each,
// twice backward) after two rows of sums, over 64 channels and over all.
struct Tile {
  int64_t row, first, pixels, width;  // index of the first rms, offset of the first element, how many, at most
  float *sums, *all, *values, *others;
};
SAE_INLINE Tile tile_of(const Norm& a, int64_t task, float* scratch) {
  const int64_t width = norm_tile(a.size), tiles = (a.inner + width - 1) / width;
  const int64_t outer = task / tiles, pixel = task % tiles * width;
  float* const values = scratch + 2 * width;
  return {outer * a.inner + pixel, outer * a.size * a.inner + pixel, a.inner - pixel < width ? a.inner - pixel : width,
          width, scratch, scratch + width, values, values + width * a.size};
}

// term(i, kept, m) is what to add for m numbers from i, `kept` their place among the values.
template <class Term>
SAE_INLINE void sum_channels(const Norm& a, const Tile& tile, Term term) {
  for (int64_t i = 0; i < 2 * tile.width; ++i) tile.sums[i] = 0;
  for (int64_t c = 0; c < a.size; ++c) {
    vectors(tile.pixels, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      store(tile.sums + i, load(tile.sums + i) + term(c * a.inner + i, c * tile.width + i, m));
    });
    if (c % 64 == 63 || c == a.size - 1)
      for (int64_t i = 0; i < tile.width; ++i) {
        tile.all[i] += tile.sums[i];
        tile.sums[i] = 0;
      }
  }
}

template <class T, bool kAct>
__attribute__((noinline)) void norm_tile_forward(const Norm& a, const Tile& tile) {
  const NormAt<T, kAct> at(a, tile.first);
  sum_channels(a, tile, [&](int64_t i, int64_t kept, int64_t m) __attribute__((always_inline)) {
    const Vec some = get(at.x + i, m);
    store(tile.values + kept, some);
    return some * some;
  });
  vectors(tile.pixels, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    const Vec rms = root(load(tile.all + i) / splat(static_cast<float>(a.size)));
    put(a.rms + tile.row + i, rms, m);
    store(tile.sums + i, splat(1.0f) / (rms + splat(a.eps)));
  });
  for (int64_t c = 0; c < a.size; ++c)
    vectors(tile.pixels, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      at.write(c * a.inner + i, load(tile.values + c * tile.width + i) * load(tile.sums + i), m);
    });
}

template <class T, bool kAct>
__attribute__((noinline)) void norm_tile_backward(const Norm& a, const Tile& tile) {
  const NormAt<T, kAct> at(a, tile.first);
  sum_channels(a, tile, [&](int64_t i, int64_t kept, int64_t m) __attribute__((always_inline)) {
    const Vec y = get(at.x + i, m), grad = at.gradient(i, y, m);
    store(tile.values + kept, y);
    store(tile.others + kept, grad);
    return y * grad;
  });
  vectors(tile.pixels, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    const Slopes s = slopes_of(get(a.rms + tile.row + i, m), load(tile.all + i), a.eps, a.size);
    store(tile.sums + i, s.across);
    store(tile.all + i, s.along);
  });
  for (int64_t c = 0; c < a.size; ++c)
    vectors(tile.pixels, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      const int64_t kept = c * tile.width + i;
      const Vec grad = load(tile.others + kept) * load(tile.sums + i);
      put(at.out + c * a.inner + i, madd(load(tile.values + kept), load(tile.all + i), grad), m, a.stream);
    });
}

template <class Body>
SAE_INLINE void norm_with(const Norm& a, bool act, Body body) {
  with(a.type, a.stream, [&](auto zero) __attribute__((always_inline)) {
    if (act) body(zero, Flag<true>{});
    else body(zero, Flag<false>{});
  });
}

void norm(const Norm& a, float* scratch, int64_t begin, int64_t end) {
  norm_with(a, a.act, [&](auto zero, auto act) __attribute__((always_inline)) {
    using T = decltype(zero);
    constexpr bool kAct = decltype(act)::value;
    if (a.inner == 1)
      row_blocks(a, begin, end, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
        norm_rows_forward<T, kAct>(a, first, count);
      });
    else
      for (int64_t task = begin; task < end; ++task)
        norm_tile_forward<T, kAct>(a, tile_of(a, task, scratch));
  });
}

void norm_backward(const Norm& a, float* scratch, int64_t begin, int64_t end) {
  norm_with(a, a.grad_act, [&](auto zero, auto act) __attribute__((always_inline)) {
    using T = decltype(zero);
    constexpr bool kAct = decltype(act)::value;
    if (a.inner == 1)
      row_blocks(a, begin, end, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
        norm_rows_backward<T, kAct>(a, scratch, first, count);
      });
    else
      for (int64_t task = begin; task < end; ++task)
        norm_tile_backward<T, kAct>(a, tile_of(a, task, scratch));
  });
}

// ---- qk_prepare

// The cosines of a token, then its sines; put together in `to` where there are several axes.
SAE_INLINE const float* turn_of(const Heads& a, int64_t batch, int64_t token, float* to) {
  if (!a.table) return nullptr;
  if (a.frames == 0) return a.table + (batch * a.table_batch + token) * 2 * a.turned;
  const int64_t in_frame = token % a.tokens_per_frame;
  const int64_t place[3] = {token / a.tokens_per_frame % a.frames, in_frame / a.width, in_frame % a.width};
  if (a.axes == 1) return a.table + place[0] * 2 * a.turned;
  const float* table = a.table;
  for (int64_t axis = 0, at = 0; axis < a.axes; at += a.widths[axis], ++axis) {
    const int64_t n = a.widths[axis];
    const float* const row = table + place[axis] * 2 * n;
    for (int64_t i = 0; i < n; ++i) {
      to[at + i] = row[i];
      to[a.turned + at + i] = row[n + i];
    }
    table += a.sizes[axis] * 2 * n;
  }
  return to;
}

// out = scale R(p) x, or R(-p): x(i, m) gives m channels from i.
template <bool kBack, class T, class X>
SAE_INLINE void turn(const Heads& a, const float* cosines, Vec scale, T* out, X x) {
  int64_t done = 0;
  const float* const sines = cosines + a.turned;
  if (cosines && a.interleaved) {
    done = a.turned;
    vectors(done, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      const Vec v = x(i, m), sine = get(sines + i, m);
      put(out + i, madd(v, get(cosines + i, m), swap_pairs(v) * (kBack ? -sine : sine)) * scale, m, a.stream);
    });
  } else if (cosines) {
    done = 2 * a.turned;
    vectors(a.turned, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      const Vec u = x(i, m), v = x(a.turned + i, m), cosine = get(cosines + i, m);
      const Vec sine = kBack ? -get(sines + i, m) : get(sines + i, m);
      put(out + i, madd(u, cosine, -v * sine) * scale, m, a.stream);
      put(out + a.turned + i, madd(v, cosine, u * sine) * scale, m, a.stream);
    });
  }
  vectors(a.dim - done, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    put(out + done + i, x(done + i, m) * scale, m, a.stream);
  });
}

// A row of D channels; rms == nullptr: not normalised.
struct Row {
  const void *x, *y;
  void* out;
  float* rms;
  const float* cosines;
};

// Up to kLanes rows, all normalised or none.
template <class T>
__attribute__((noinline)) void turn_rows(const Heads& a, const Row* rows, int64_t count) {
  alignas(64) float rms[kLanes], scales[kLanes];
  if (rows[0].rms) {
    const Vec squares = sums_of_rows(count, a.dim, [&](Vec sum, int64_t r, int64_t i, int64_t m)
                                                       __attribute__((always_inline)) {
      const Vec some = get(static_cast<const T*>(rows[r].x) + i, m);
      return madd(some, some, sum);
    });
    const Vec found = root(squares / splat(static_cast<float>(a.dim)));
    store(rms, found);
    store(scales, splat(1.0f) / (found + splat(a.eps)));
    for (int64_t r = 0; r < count; ++r) *rows[r].rms = rms[r];
  }
  for (int64_t r = 0; r < count; ++r) {
    const T* const x = static_cast<const T*>(rows[r].x);
    turn<false>(a, rows[r].cosines, rows[0].rms ? splat(scales[r]) : splat(1.0f), static_cast<T*>(rows[r].out),
                         [&](int64_t i, int64_t m) __attribute__((always_inline)) { return get(x + i, m); });
  }
}

// From the output y: a rotation keeps products.
template <class T>
__attribute__((noinline)) void turn_rows_back(const Heads& a, const Row* rows, int64_t count) {
  alignas(64) float rms[kLanes] = {}, across[kLanes], along[kLanes];
  if (rows[0].rms) {
    const Vec dots = sums_of_rows(count, a.dim, [&](Vec sum, int64_t r, int64_t i, int64_t m)
                                                    __attribute__((always_inline)) {
      return madd(get(static_cast<const T*>(rows[r].x) + i, m), get(static_cast<const T*>(rows[r].y) + i, m), sum);
    });
    for (int64_t r = 0; r < count; ++r) rms[r] = *rows[r].rms;
    const Slopes s = slopes_of(load(rms), dots, a.eps, a.dim);
    store(across, s.across);
    store(along, s.along);
  }
  for (int64_t r = 0; r < count; ++r) {
    const T *const grad = static_cast<const T*>(rows[r].x), *const y = static_cast<const T*>(rows[r].y);
    T* const out = static_cast<T*>(rows[r].out);
    const Vec one = splat(1.0f);
    if (rows[0].rms) {
      const Vec grad_factor = splat(across[r]), y_factor = splat(along[r]);
      turn<true>(a, rows[r].cosines, one, out, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
        return madd(get(y + i, m), y_factor, get(grad + i, m) * grad_factor);
      });
    } else {
      turn<true>(a, rows[r].cosines, one, out,
                          [&](int64_t i, int64_t m) __attribute__((always_inline)) { return get(grad + i, m); });
    }
  }
}

// Tasks are kHeadTokens tokens with all their heads; `scratch` holds their cosines and sines.
template <bool kBack>
SAE_INLINE void all_heads(const Heads& a, float* scratch, int64_t begin, int64_t end) {
  with(a.type, a.stream, [&](auto zero) __attribute__((always_inline)) {
    using T = decltype(zero);
    const int64_t groups = (a.tokens + kHeadTokens - 1) / kHeadTokens;
    Row rows[kLanes];
    int64_t held = 0;
    const auto work = [&]() {
      if (held == 0) return;
      if constexpr (kBack) turn_rows_back<T>(a, rows, held);
      else turn_rows<T>(a, rows, held);
      held = 0;
    };
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, first = task % groups * kHeadTokens;
      const int64_t count = a.tokens - first < kHeadTokens ? a.tokens - first : kHeadTokens;
      const float* turns[kHeadTokens];
      for (int64_t i = 0; i < count; ++i) turns[i] = turn_of(a, b, first + i, scratch + i * 2 * a.turned);
      // In the order of memory: a token's heads, or a head's tokens.
      const int64_t step = a.tokens_first ? 1 : count;
      for (int64_t i = 0; i < count; i += step)
        for (int p = 0; p < a.parts; ++p)
          for (int64_t h = 0; h < a.part[p].heads; ++h)
            for (int64_t j = i; j < i + step; ++j) {
              const HeadsOf& part = a.part[p];
              const int64_t s = first + j;
              const auto at = [&](const void* data, const int64_t* strides) __attribute__((always_inline)) {
                return static_cast<const T*>(data) + b * strides[0] + h * strides[1] + s * strides[2];
              };
              if (held == kLanes || (held > 0 && !rows[0].rms != !part.rms)) work();
              rows[held++] = {at(part.x, part.x_strides), part.y ? at(part.y, part.y_strides) : nullptr,
                              const_cast<T*>(at(part.out, part.out_strides)),
                              part.rms ? part.rms + b * part.rms_strides[0] + h * part.rms_strides[1] + s : nullptr,
                              part.turned ? turns[j] : nullptr};
            }
      work();
    }
  });
}

void heads(const Heads& a, float* scratch, int64_t begin, int64_t end) { all_heads<false>(a, scratch, begin, end); }
void heads_backward(const Heads& a, float* scratch, int64_t begin, int64_t end) {
  all_heads<true>(a, scratch, begin, end);
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {norm, norm_backward, heads, heads_backward};

}  // namespace SAE_ISA
}  // namespace sae
