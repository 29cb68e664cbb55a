// The small steps between matrix products on the CPU: what the checks (steps.cpp) hand to the loops (cpu_steps.cpp,
// cpu_norms.cpp), which are compiled once for each instruction set.
//
// All tensors of a call are dense, of one type (fp32, bf16, fp16) and in one order of memory. `stream` writes past the
// caches; outputs whose data is nullptr are not wanted.
#pragma once

#include "cpu_kernels.h"

namespace sae {

// Elements one by one: out[k] = f(in).
struct Pointwise {
  Type type = Type::f32;
  bool stream = false;
  int64_t size = 0;
  const void* in[2] = {};
  void* out[2] = {};
  float factor[2] = {};
  float limit = 0;
};

// out = factor in, for two parts of each row side by side: mp_cat, and back.
struct Part {
  const void* in;
  void* out;
  int64_t in_row, out_row, size;  // elements from one row to the next, and of a row
  float factor;
};
struct Parts {
  Type type = Type::f32;
  bool stream = false;
  int64_t rows = 0;
  Part part[2] = {};
};

// x (groups, pixels, channels) times scale (groups, channels), fp32, then mp_silu. Contiguous videos are
// (B C F, pixels, 1), channels-last ones (B F, pixels, C).
struct Modulation {
  Type type = Type::f32;
  bool stream = false;
  int64_t groups = 0, pixels = 0, channels = 0;
  const void *x = nullptr, *grad = nullptr;
  const float* scale = nullptr;
  void* out = nullptr;           // of the shape of x: the result, or the gradient of x
  float* grad_scale = nullptr;
};

// x (outer, size, inner) normalised along `size`. Backward: grad, and that of act if there was one, to `out`.
struct Norm {
  Type type = Type::f32;
  bool stream = false;
  int64_t outer = 0, size = 0, inner = 0;
  float eps = 0;
  const void* x = nullptr;       // backward: the result of forward
  float* rms = nullptr;          // (outer, inner)
  void *out = nullptr, *act = nullptr;
  const void *grad = nullptr, *grad_act = nullptr;
};

// A part (q, k or v) of the heads: strides in elements, the last dimension contiguous.
struct HeadsOf {
  const void *x, *y;             // forward: x; backward: gradient, and the result of forward where it is normalised
  void* out;
  float* rms;                    // (batch, heads, tokens), nullptr: not normalised
  int64_t heads, x_strides[3], y_strides[3], out_strides[3], rms_strides[2];
  bool turned;
};
constexpr int kMaxAxes = 16;
// Heads of D channels scaled to unit RMS and turned. The turn of a token: a row of `table` for each axis, by the token's
// place; in such a row the cosines of `widths` channels, then as many sines.
struct Heads {
  Type type = Type::f32;
  bool stream = false, interleaved = false, tokens_first = false;  // the last: a token's heads lie together
  int64_t batch = 0, tokens = 0, dim = 0;
  float eps = 0;
  int parts = 0, axes = 0;
  HeadsOf part[3] = {};
  const float* table = nullptr;  // nullptr: nothing is turned
  int64_t turned = 0;            // numbers in a token's cosines: pairs, or channels where pairs are neighbours
  int64_t widths[kMaxAxes] = {}, sizes[kMaxAxes] = {};
  int64_t frames = 0, tokens_per_frame = 1, width = 1;  // frames = 0: the table has a row for each token
  int64_t table_batch = 0;       // rows of the table from one batch to the next
};

// Where `inner` = 1: rows that a task works on, which stay in a cache.
constexpr int64_t norm_rows(int64_t size) { return size <= 2048 ? 16 : 1; }
// Where `inner` > 1 (channels outside of pixels): pixels that a task works on, so that their channels stay in a cache.
constexpr int64_t norm_tile(int64_t size) {
  const int64_t fit = 8192 / size / 16 * 16;
  return fit < 16 ? 16 : fit > 256 ? 256 : fit;
}
// Tokens that a task of the heads works on.
constexpr int64_t kHeadTokens = 16;
// Elements of a row of mp_cat that a task copies.
constexpr int64_t kPartChunk = 16 * kChunk;

struct StepKernels {
  // Tasks [begin, end); `scratch` holds as many floats as steps.cpp says.
  void (*silu)(const Pointwise&, float* scratch, int64_t begin, int64_t end);
  void (*silu_backward)(const Pointwise&, float*, int64_t, int64_t);
  void (*sum)(const Pointwise&, float*, int64_t, int64_t);
  void (*sum_backward)(const Pointwise&, float*, int64_t, int64_t);
  void (*parts)(const Parts&, float*, int64_t, int64_t);
  void (*modulate)(const Modulation&, float*, int64_t, int64_t);
  void (*modulate_backward)(const Modulation&, float*, int64_t, int64_t);
};

struct NormKernels {
  void (*norm)(const Norm&, float*, int64_t, int64_t);
  void (*norm_backward)(const Norm&, float*, int64_t, int64_t);
  void (*heads)(const Heads&, float*, int64_t, int64_t);
  void (*heads_backward)(const Heads&, float*, int64_t, int64_t);
};

}  // namespace sae
