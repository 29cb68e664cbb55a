// causal_conv3d's inner loops, compiled once for each instruction set; SAE_ISA names the namespace they land in.
//
// A tap is one product: the pixels whose neighbour there lies inside the map, by row pointers, times that tap's weights.
// Activations are read where they lie, padding is never multiplied, and every sum is taken in an order that follows from
// the shapes alone: first over the channels of a tap, then over the taps.
#include "cpu_convolution.h"

#include "micro_gemm.h"

#ifndef SAE_ISA
#define SAE_ISA baseline
#endif

namespace sae {
namespace SAE_ISA {
namespace {

using namespace simd;

// A register tile: kMost rows of at most two vectors, which leaves three registers for operands.
constexpr int64_t kVectors = 2, kBlock = kVectors * kLanes;
#if defined(__AVX512F__)
constexpr int kMost = 12;
#else
constexpr int kMost = 6;
#endif
// Channels that one pass over a task's pixels multiplies: 256 of two vectors of 64 bytes fill 32 KiB.
constexpr int64_t kDepth = 256;

SAE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SAE_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Vectors of a block of `channels` channels.
int64_t vectors_of(int64_t channels, int64_t block) {
  const int64_t all = (channels + kLanes - 1) / kLanes;
  return least(kVectors, all - block * kVectors);
}

void clear(float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, Vec{});
}

// Calls f(begin, rows) for pieces of [begin, end) of even size, at most kMost.
template <class Function>
SAE_INLINE void in_tiles(int64_t begin, int64_t end, const Function& f) {
  for (int64_t left = (end - begin + kMost - 1) / kMost; left > 0; --left) {
    const int64_t rows = (end - begin + left - 1) / left;
    f(begin, rows);
    begin += rows;
  }
}

// Calls f<M>() for a number of rows that only the run knows.
template <int M, class Function>
SAE_INLINE void with_rows(int64_t rows, const Function& f) {
  if constexpr (M == 1) f.template operator()<1>();
  else if (rows == M) f.template operator()<M>();
  else with_rows<M - 1>(rows, f);
}

// ---- a product of rows that lie anywhere

template <int M, int N>
__attribute__((noinline)) void row_tile(const float* const* from, int64_t k, const float* __restrict b, float* const* to) {
  const float* a[M];
  Vec sum[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    a[i] = from[i] + k;
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) sum[i][j] = Vec{};
  }
  // Up to zero: twelve rows leave no register for an end.
  for (int64_t kk = -k; kk != 0; ++kk, b += N * kLanes) {
    Vec right[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec left = splat(a[i][kk]);
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) sum[i][j] = madd(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) store(to[i] + j * kLanes, load(to[i] + j * kLanes) + sum[i][j]);
}

// The pixels of a window, for each spatial tap those that have a neighbour there, frame after frame.
class Pixels {
 public:
  static int64_t floats(int64_t taps, int64_t pixels) { return taps * (pixels * 3 + 1) + 16; }

  Pixels(const Convolution& c, const Window& w, float* scratch)
      : c_(c), w_(w), taps_(c.ky * c.kx), pixels_(w.frames * w.rows * c.columns) {
    offsets_ = reinterpret_cast<int64_t*>(scratch);
    places_ = reinterpret_cast<int32_t*>(offsets_ + taps_ * pixels_);
    counts_ = places_ + taps_ * pixels_;
  }

  // acc[pixel] += the taps of `weights` (ky kx, k, vectors) over frames of `source`, the window's first of which is frame
  // `first` there, for window frames [begin, end). Where `constant` is there, all of it is those k numbers.
  void add_taps(const Video& source, int64_t first, const float* constant, int64_t begin, int64_t end,
                const float* weights, int64_t k, int64_t vectors, float* acc) {
    if (begin >= end) return;
    place(constant ? c_.x : source);
    const float* const origin = source.data + w_.batch * source.batch;
    const int64_t shift = first * source.frame;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const int64_t *const offsets = offsets_ + tap * pixels_, count = counts_[tap];
      const int32_t* const places = places_ + tap * pixels_;
      for (int64_t depth = 0; depth < k; depth += kDepth) {
        const int64_t now = least(kDepth, k - depth);
        const float* const b = weights + (tap * k + depth) * vectors * kLanes;
        in_tiles(begin * count, end * count, [&](int64_t at, int64_t rows) __attribute__((always_inline)) {
          const float* from[kMost];
          float* to[kMost];
          for (int64_t i = 0; i < rows; ++i) {
            from[i] = (constant ? constant : origin + (shift + offsets[at + i])) + depth;
            to[i] = acc + places[at + i] * vectors * kLanes;
          }
          with_rows<kMost>(rows, [&]<int M>() __attribute__((always_inline)) {
            if (vectors == 2) row_tile<M, 2>(from, now, b, to);
            else row_tile<M, 1>(from, now, b, to);
          });
        });
      }
    }
  }

 private:
  void place(const Video& source) {
    if (placed_ && source.frame == frame_ && source.row == row_ && source.column == column_) return;
    placed_ = true;
    frame_ = source.frame;
    row_ = source.row;
    column_ = source.column;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const int64_t dy = tap / c_.kx - c_.ky / 2, dx = tap % c_.kx - c_.kx / 2;
      const int64_t top = most(w_.row, -dy), bottom = least(w_.row + w_.rows, c_.rows - dy);
      const int64_t left = most(0, -dx), right = least(c_.columns, c_.columns - dx);
      int64_t n = tap * pixels_;
      for (int64_t frame = 0; frame < w_.frames; ++frame)
        for (int64_t y = top; y < bottom; ++y)
          for (int64_t x = left; x < right; ++x, ++n) {
            offsets_[n] = frame * frame_ + (y + dy) * row_ + (x + dx) * column_;
            places_[n] = static_cast<int32_t>((frame * w_.rows + y - w_.row) * c_.columns + x);
          }
      counts_[tap] = static_cast<int32_t>((n - tap * pixels_) / w_.frames);
    }
  }

  const Convolution& c_;
  const Window& w_;
  const int64_t taps_, pixels_;
  int64_t* offsets_;   // (tap, pixel) in the source
  int32_t* places_;    // (tap, pixel) in the window
  int32_t* counts_;    // of a frame
  bool placed_ = false;
  int64_t frame_ = 0, row_ = 0, column_ = 0;
};

int64_t first_frame(const Convolution& c, int64_t stream) {
  return stream == 0 ? c.clean_start : c.noisy_start + (stream - 1) * c.frames;
}

SAE_INLINE float* pixel(const Video& v, int64_t batch, int64_t frame, int64_t row, int64_t column) {
  return v.data + batch * v.batch + frame * v.frame + row * v.row + column * v.column;
}

// Calls f(number in the window, row, column) for every pixel of one of the window's frames.
template <class Function>
SAE_INLINE void each_pixel(const Convolution& c, const Window& w, int64_t frame, const Function& f) {
  int64_t n = frame * w.rows * c.columns;
  for (int64_t y = w.row; y < w.row + w.rows; ++y)
    for (int64_t x = 0; x < c.columns; ++x) f(n++, y, x);
}

// to[i] = f(i, whole vector?) for n channels of up to kVectors vectors; the last may be a part of one.
template <class Function>
SAE_INLINE void put(float* to, int64_t n, const Function& f) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = f(i);
    if (n - i >= kLanes) {
      store(to + i, v);
    } else {
      for (int64_t j = 0; j < n - i; ++j) to[i + j] = v[j];
    }
  }
}

SAE_INLINE Vec get(const float* from, int64_t n) {
  if (n >= kLanes) return load(from);
  Vec v{};
  for (int64_t j = 0; j < n; ++j) v[j] = from[j];
  return v;
}

// ---- weights

// For one block of output channels: to[tap][i][o] = weight[o][i][tap].
void pack(const Convolution& c, int64_t block) {
  const int64_t taps = c.kt * c.ky * c.kx, fan = c.in * taps, vectors = vectors_of(c.out, block), width = vectors * kLanes;
  float* const to = c.packed + block * fan * kBlock;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t first = block * kBlock + v * kLanes, held = least(kLanes, c.out - first);
    const float* const from = c.weight + first * fan;
    int64_t i = 0, tap = 0;
    const auto next = [&] __attribute__((always_inline)) {
      if (++tap == taps) {
        tap = 0;
        ++i;
      }
    };
    int64_t e = 0;
    if (held == kLanes)
      for (float four[4 * kLanes]; e + 4 <= fan; e += 4) {
        store_columns(from + e, fan, four, kLanes);
        for (int64_t j = 0; j < 4; ++j, next()) store(to + (tap * c.in + i) * width + v * kLanes, load(four + j * kLanes));
      }
    for (; e < fan; ++e, next())
      for (int64_t lane = 0; lane < kLanes; ++lane)
        to[(tap * c.in + i) * width + v * kLanes + lane] = lane < held ? from[lane * fan + e] : 0.0f;
  }
}

// For one block of input channels: to[tap][o][i] = weight[o][i][tap turned around in space].
void pack_turned(const Convolution& c, int64_t block) {
  const int64_t space = c.ky * c.kx, taps = c.kt * space, vectors = vectors_of(c.in, block), width = vectors * kLanes;
  float* const to = c.packed + block * c.out * taps * kBlock;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t first = block * kBlock + v * kLanes, held = least(kLanes, c.in - first);
    for (int64_t o = 0; o < c.out; ++o) {
      const float* const from = c.weight + (o * c.in + first) * taps;
      const auto place = [&](int64_t tap) __attribute__((always_inline)) {
        const int64_t turned = tap / space * space + space - 1 - tap % space;
        return to + (turned * c.out + o) * width + v * kLanes;
      };
      int64_t tap = 0;
      if (held == kLanes)
        for (float four[4 * kLanes]; tap + 4 <= taps; tap += 4) {
          store_columns(from + tap, taps, four, kLanes);
          for (int64_t j = 0; j < 4; ++j) store(place(tap + j), load(four + j * kLanes));
        }
      for (; tap < taps; ++tap)
        for (int64_t lane = 0; lane < kLanes; ++lane) place(tap)[lane] = lane < held ? from[lane * taps + tap] : 0.0f;
    }
  }
}

// ---- forward

void forward(const Convolution& c, const Window& w, int64_t block, float* scratch) {
  const int64_t vectors = vectors_of(c.out, block), width = vectors * kLanes, pixels = w.frames * w.rows * c.columns;
  const int64_t channel = block * kBlock, held = least(width, c.out - channel), space = c.ky * c.kx;
  const float* const weights = c.packed + block * c.in * c.kt * space * kBlock;
  float *const past = scratch, *const last = past + pixels * kBlock, *const constant = last + pixels * kBlock;
  Pixels taps(c, w, constant + (c.in + 15) / 16 * 16);
  if (c.kt > 1) {
    clear(past, pixels * width);
    for (int64_t i = 0; i < c.in; ++i) constant[i] = c.pad;
    for (int64_t tap = 0; tap < c.kt - 1; ++tap) {
      const int64_t source = w.frame - (c.kt - 1 - tap), before = least(w.frames, most(0, -source));
      const float* const of_tap = weights + tap * space * c.in * width;
      if (c.history.data)
        taps.add_taps(c.history, source + c.kt - 1, nullptr, 0, before, of_tap, c.in, vectors, past);
      else if (c.pad != 0)
        taps.add_taps(c.history, 0, constant, 0, before, of_tap, c.in, vectors, past);
      taps.add_taps(c.x, c.clean_start + source, nullptr, before, w.frames, of_tap, c.in, vectors, past);
    }
    if (c.past.data)
      for (int64_t f = 0; f < w.frames; ++f)
        each_pixel(c, w, f, [&](int64_t n, int64_t y, int64_t x) __attribute__((always_inline)) {
          put(pixel(c.past, w.batch, w.frame + f, y, x) + channel, held,
              [&](int64_t i) __attribute__((always_inline)) { return load(past + n * width + i); });
        });
  }
  for (int64_t stream = 0; stream < c.streams; ++stream) {
    const int64_t first = first_frame(c, stream) + w.frame;
    clear(last, pixels * width);
    taps.add_taps(c.x, first, nullptr, 0, w.frames, weights + (c.kt - 1) * space * c.in * width, c.in, vectors, last);
    for (int64_t f = 0; f < w.frames; ++f) {
      const int64_t scale = w.batch * c.streams * c.frames + first + f;
      const Vec a = splat(c.last_scale ? c.last_scale[scale] : 1.0f), b = splat(c.past_scale ? c.past_scale[scale] : 1.0f);
      each_pixel(c, w, f, [&](int64_t n, int64_t y, int64_t x) __attribute__((always_inline)) {
        put(pixel(c.y, w.batch, first + f, y, x) + channel, held, [&](int64_t i) __attribute__((always_inline)) {
          const Vec own = a * load(last + n * width + i);
          return c.kt > 1 ? own + b * load(past + n * width + i) : own;
        });
      });
    }
  }
}

// ---- backward

// total[frame] = sum over streams of past_scale grad[frame of the stream]; past_scale's gradient is <grad, past>.
void sum_streams(const Convolution& c, int64_t batch, int64_t frame) {
  for (int64_t stream = 0; stream < c.streams; ++stream) {
    const int64_t f = first_frame(c, stream) + frame, at = batch * c.streams * c.frames + f;
    const Vec scale = splat(c.past_scale ? c.past_scale[at] : 1.0f);
    double dot = 0;
    for (int64_t y = 0; y < c.rows; ++y) {
      Vec of_row{};
      for (int64_t x = 0; x < c.columns; ++x) {
        const float* const grad = pixel(c.grad, batch, f, y, x);
        float* const total = c.sums_streams ? pixel(c.total, batch, frame, y, x) : nullptr;
        const float* const past = c.grad_past_scale ? pixel(c.past, batch, frame, y, x) : nullptr;
        for (int64_t i = 0; i < c.out; i += kLanes) {
          const Vec g = get(grad + i, c.out - i);
          if (past) of_row = madd(g, get(past + i, c.out - i), of_row);
          if (total)
            put(total + i, least(kLanes, c.out - i), [&](int64_t) __attribute__((always_inline)) {
              return stream == 0 ? scale * g : get(total + i, c.out - i) + scale * g;
            });
        }
      }
      dot += simd::total(of_row);
    }
    if (c.grad_past_scale) c.grad_past_scale[at] = static_cast<float>(dot);
  }
}

void data_gradient(const Convolution& c, const Window& w, int64_t block, int64_t part, float* scratch) {
  const int64_t vectors = vectors_of(c.in, block), width = vectors * kLanes, pixels = w.frames * w.rows * c.columns;
  const int64_t channel = block * kBlock, held = least(width, c.in - channel), space = c.ky * c.kx;
  const float* const weights = c.packed + block * c.out * c.kt * space * kBlock;
  float *const past = scratch, *const last = past + pixels * kBlock;
  Pixels taps(c, w, last + pixels * kBlock);
  const bool is_history = w.frame < 0, has_past = c.kt > 1 && (is_history || c.grad_x.data);
  if (has_past) {
    clear(past, pixels * width);
    for (int64_t tap = 0; tap < c.kt - 1; ++tap) {
      const int64_t source = w.frame + (c.kt - 1 - tap);
      const int64_t begin = least(w.frames, most(0, -source)), end = most(begin, least(w.frames, c.frames - source));
      taps.add_taps(c.total, source, nullptr, begin, end, weights + tap * space * c.out * width, c.out, vectors, past);
    }
  }
  if (is_history) {
    for (int64_t f = 0; f < w.frames; ++f)
      each_pixel(c, w, f, [&](int64_t n, int64_t y, int64_t x) __attribute__((always_inline)) {
        put(pixel(c.grad_history, w.batch, w.frame + c.kt - 1 + f, y, x) + channel, held,
            [&](int64_t i) __attribute__((always_inline)) { return load(past + n * width + i); });
      });
    return;
  }
  for (int64_t stream = 0; stream < c.streams; ++stream) {
    const int64_t first = first_frame(c, stream) + w.frame;
    const bool adds_past = has_past && stream == 0;
    clear(last, pixels * width);
    taps.add_taps(c.grad, first, nullptr, 0, w.frames, weights + (c.kt - 1) * space * c.out * width, c.out, vectors, last);
    for (int64_t f = 0; f < w.frames; ++f) {
      const int64_t at = w.batch * c.streams * c.frames + first + f;
      const Vec scale = splat(c.last_scale ? c.last_scale[at] : 1.0f);
      double dot = 0;
      Vec of_frame{};
      each_pixel(c, w, f, [&](int64_t n, int64_t y, int64_t x) __attribute__((always_inline)) {
        const float* const own = last + n * width;
        if (c.dots)
          for (int64_t i = 0; i < held; i += kLanes)
            of_frame = madd(load(own + i), get(pixel(c.x, w.batch, first + f, y, x) + channel + i, held - i), of_frame);
        if (c.grad_x.data)
          put(pixel(c.grad_x, w.batch, first + f, y, x) + channel, held, [&](int64_t i) __attribute__((always_inline)) {
            const Vec scaled = scale * load(own + i);
            return adds_past ? scaled + load(past + n * width + i) : scaled;
          });
      });
      dot += simd::total(of_frame);
      if (c.dots) c.dots[at * c.parts + part] = static_cast<float>(dot);
    }
  }
}

// n pixels whose inputs lie `stride` apart and whose gradients follow each other.
struct Run {
  const float *input, *grad;
  int64_t stride, n;
};

// to (M rows `apart`) += the products of M input channels with the gradients of N vectors, over all pixels of the runs.
template <int M, int N>
__attribute__((noinline)) void channel_tile(const Run* runs, int64_t count, int64_t channel, float* __restrict to, int64_t apart) {
  Vec sum[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) sum[i][j] = Vec{};
  for (int64_t r = 0; r < count; ++r) {
    const float *a = runs[r].input + channel, *b = runs[r].grad;
    const int64_t stride = runs[r].stride;
    for (int64_t k = runs[r].n; k > 0; --k, a += stride, b += N * kLanes) {
      Vec right[N];
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const Vec left = splat(a[i]);
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) sum[i][j] = madd(left, right[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
      float* const at = to + i * apart + j * kLanes;
      store(at, load(at) + sum[i][j]);
    }
}

// The weight gradient of one tap in time, a block of output channels and some input channels.
class WeightGradient {
 public:
  static int64_t floats(const Convolution& c, int64_t pixels) {
    return c.ky * c.kx * kGradientChannels * kBlock + pixels * kBlock + pixels * 8 + (c.in + 15) / 16 * 16 +
           kLanes * c.ky * c.kx * kLanes + 64;
  }

  WeightGradient(const Convolution& c, int64_t block, int64_t first, int64_t pixels, float* scratch)
      : c_(c), space_(c.ky * c.kx), vectors_(vectors_of(c.out, block)), width_(vectors_ * kLanes),
        out_(block * kBlock), held_(least(width_, c.out - out_)), in_(first * kGradientChannels),
        channels_(least(kGradientChannels, c.in - in_)) {
    sums_ = scratch;
    grad_ = sums_ + space_ * kGradientChannels * kBlock;
    runs_ = reinterpret_cast<Run*>(grad_ + pixels * kBlock);
    constant_ = reinterpret_cast<float*>(runs_ + pixels);
    for (int64_t i = 0; i < c.in; ++i) constant_[i] = c.pad;
    clear(sums_, space_ * channels_ * width_);
  }

  // The window's gradients, those of frame `first` first, each frame times its scale.
  void take(const Window& w, const Video& from, int64_t first, const float* scales) {
    for (int64_t f = 0; f < w.frames; ++f) {
      const Vec scale = splat(scales ? scales[first + f] : 1.0f);
      each_pixel(c_, w, f, [&](int64_t n, int64_t y, int64_t x) __attribute__((always_inline)) {
        const float* const at = pixel(from, w.batch, first + f, y, x) + out_;
        for (int64_t i = 0; i < width_; i += kLanes)
          store(grad_ + n * width_ + i, i < held_ ? scale * get(at + i, held_ - i) : Vec{});
      });
    }
  }

  // The inputs of window frames [begin, end): frame `first` is that of the window's first.
  void meet(const Window& w, const Video& source, int64_t first, bool constant, int64_t begin, int64_t end) {
    if (begin >= end) return;
    for (int64_t tap = 0; tap < space_; ++tap) {
      const int64_t count = find_runs(w, source, first, constant, begin, end, tap);
      if (count == 0) continue;
      in_tiles(0, channels_, [&](int64_t at, int64_t rows) __attribute__((always_inline)) {
        float* const to = sums_ + (at * space_ + tap) * width_;
        with_rows<kMost>(rows, [&]<int M>() __attribute__((always_inline)) {
          if (vectors_ == 2) channel_tile<M, 2>(runs_, count, in_ + at, to, space_ * width_);
          else channel_tile<M, 1>(runs_, count, in_ + at, to, space_ * width_);
        });
      });
    }
  }

  // To (out, in, kt, ky, kx).
  void give(int64_t tap) {
    float* const columns = reinterpret_cast<float*>(constant_);
    const int64_t apart = c_.kt * space_;
    for (int64_t i = 0; i < channels_; i += kLanes) {
      const int64_t of_i = least(kLanes, channels_ - i), rows = of_i * space_, whole = rows / kLanes * kLanes;
      const float* const from = sums_ + i * space_ * width_;
      for (int64_t o = 0; o < held_; o += 4) {
        for (int64_t e = 0; e < whole; e += kLanes) store_columns(from + e * width_ + o, width_, columns + e, kLanes * space_);
        for (int64_t e = whole; e < rows; ++e)
          for (int64_t j = 0; j < 4; ++j) columns[j * kLanes * space_ + e] = from[e * width_ + o + j];
        for (int64_t j = 0; j < least(4, held_ - o); ++j) {
          float* to = c_.grad_weight + (((out_ + o + j) * c_.in + in_ + i) * c_.kt + tap) * space_;
          const float* column = columns + j * kLanes * space_;
          for (int64_t n = 0; n < of_i; ++n, to += apart, column += space_)
            for (int64_t s = 0; s < space_; ++s) to[s] = column[s];
        }
      }
    }
  }

 private:
  int64_t find_runs(const Window& w, const Video& source, int64_t first, bool constant, int64_t begin, int64_t end,
                    int64_t tap) {
    const int64_t dy = tap / c_.kx - c_.ky / 2, dx = tap % c_.kx - c_.kx / 2;
    const int64_t top = most(w.row, -dy), bottom = least(w.row + w.rows, c_.rows - dy);
    const int64_t left = most(0, -dx), n = least(c_.columns, c_.columns - dx) - left;
    int64_t count = 0;
    if (n <= 0) return 0;
    for (int64_t f = begin; f < end; ++f)
      for (int64_t y = top; y < bottom; ++y) {
        const float* const grad = grad_ + ((f * w.rows + y - w.row) * c_.columns + left) * width_;
        const float* const input = constant ? constant_ : pixel(source, w.batch, first + f, y + dy, left + dx);
        const int64_t stride = constant ? 0 : source.column;
        const Run before = count > 0 ? runs_[count - 1] : Run{};
        if (count > 0 && before.input + before.n * stride == input && before.grad + before.n * width_ == grad)
          runs_[count - 1].n += n;
        else runs_[count++] = {input, grad, stride, n};
      }
    return count;
  }

  const Convolution& c_;
  const int64_t space_, vectors_, width_, out_, held_, in_, channels_;
  float* sums_;      // (channel, tap, width)
  float* grad_;      // (pixel, width)
  Run* runs_;
  float* constant_;  // c.in numbers, later four columns of sums
};

void weight_gradient(const Convolution& c, int64_t tap, int64_t block, int64_t first, int64_t frames, int64_t rows,
                     float* scratch) {
  WeightGradient gradient(c, block, first, frames * rows * c.columns, scratch);
  const bool last = tap == c.kt - 1;
  for (int64_t batch = 0; batch < c.batch; ++batch)
    for (int64_t stream = 0; stream < (last ? c.streams : 1); ++stream)
      for (int64_t frame = 0; frame < c.frames; frame += frames)
        for (int64_t row = 0; row < c.rows; row += rows) {
          const Window w{batch, frame, least(frames, c.frames - frame), row, least(rows, c.rows - row)};
          if (last) {
            const int64_t start = first_frame(c, stream) + frame;
            gradient.take(w, c.grad, start, c.last_scale ? c.last_scale + batch * c.streams * c.frames : nullptr);
            gradient.meet(w, c.x, start, false, 0, w.frames);
            continue;
          }
          gradient.take(w, c.total, frame, nullptr);
          const int64_t source = frame - (c.kt - 1 - tap), before = least(w.frames, most(0, -source));
          if (c.history.data) gradient.meet(w, c.history, source + c.kt - 1, false, 0, before);
          else if (c.pad != 0) gradient.meet(w, c.history, 0, true, 0, before);
          gradient.meet(w, c.x, c.clean_start + source, false, before, w.frames);
        }
  gradient.give(tap);
}

int64_t scratch(const Convolution& c, int64_t pixels) {
  const int64_t products = 2 * pixels * kBlock + (c.in + 15) / 16 * 16 + Pixels::floats(c.ky * c.kx, pixels);
  return most(products, WeightGradient::floats(c, pixels));
}

}  // namespace

extern const ConvolutionKernels convolution_kernels;
const ConvolutionKernels convolution_kernels = {kBlock, scratch, pack, pack_turned, forward, data_gradient,
                                                sum_streams, weight_gradient};

}  // namespace SAE_ISA
}  // namespace sae
