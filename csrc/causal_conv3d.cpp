// causal_conv3d on the CPU: checks, then tasks, each of which sums some output channels of some pixels, or one tap's
// weight gradient of some channels, by itself and in a fixed order.
#include "cpu_convolution.h"

#include <algorithm>
#include <optional>

#include "check.h"
#include "ops.h"
#include "tasks.h"

namespace sae {

namespace {

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

Video video_of(const char* name, const Tensor& t, int64_t batch, int64_t channels, int64_t frames, int64_t rows,
               int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 5 && t.size(0) == batch && t.size(1) == channels && t.size(2) == frames &&
                      t.size(3) == rows && t.size(4) == columns,
                  name, ": must have shape (", batch, ", ", channels, ", ", frames, ", ", rows, ", ", columns,
                  "), got ", shape_of(t));
  STD_TORCH_CHECK(type_of(name, t) == Type::f32, name, ": dtype must be float32");
  STD_TORCH_CHECK(channels <= 1 || t.stride(1) == 1, name, ": must have contiguous channels, got stride ", t.stride(1));
  return {static_cast<float*>(t.data_ptr()), t.stride(0), t.stride(2), t.stride(3), t.stride(4)};
}

float* numbers_of(const char* name, const std::optional<Tensor>& t, int64_t count) {
  if (!t) return nullptr;
  check_contiguous(name, *t);
  STD_TORCH_CHECK(t->numel() == count && type_of(name, *t) == Type::f32, name, ": must be float32 of ", count,
                  " elements, got shape ", shape_of(*t));
  return static_cast<float*>(t->data_ptr());
}

// The geometry; of the tensors, those that forward and backward have in common.
Convolution convolution_of(const Tensor& like, const std::optional<Tensor>& x, const Tensor& weight,
                           const std::optional<Tensor>& past_scale, const std::optional<Tensor>& last_scale,
                           const std::optional<Tensor>& history, const std::optional<Tensor>& past, double pad_value,
                           int64_t frames, int64_t copies, bool noisy_first) {
  STD_TORCH_CHECK(like.dim() == 5 && weight.dim() == 5, "x, weight: must have 5 dims, got ", shape_of(like), " and ",
                  shape_of(weight));
  STD_TORCH_CHECK(frames >= 1 && copies >= 0 && (x || frames == 1), "frames, copies: must be at least 1 and 0, and ",
                  "frames 1 without x, got ", frames, " and ", copies);
  Convolution c{};
  c.batch = like.size(0);
  c.frames = frames;
  c.streams = x ? 1 + copies : 0;
  c.clean_start = noisy_first ? copies * frames : 0;
  c.noisy_start = noisy_first ? 0 : frames;
  c.rows = like.size(3);
  c.columns = like.size(4);
  c.out = weight.size(0);
  c.in = weight.size(1);
  c.kt = weight.size(2);
  c.ky = weight.size(3);
  c.kx = weight.size(4);
  STD_TORCH_CHECK(c.kt >= 1 && c.ky % 2 == 1 && c.kx % 2 == 1, "weight: must have odd ky and kx, got ", shape_of(weight));
  STD_TORCH_CHECK(c.rows * c.columns <= int64_t{1} << 30, "x: must have maps of at most 2^30 pixels, got ", c.rows,
                  " x ", c.columns);
  c.weight = numbers_of("weight", weight, weight.numel());
  c.pad = static_cast<float>(pad_value);
  const int64_t all = c.streams * frames;
  if (x) c.x = video_of("x", *x, c.batch, c.in, all, c.rows, c.columns);
  if (history) c.history = video_of("history", *history, c.batch, c.in, c.kt - 1, c.rows, c.columns);
  if (past) c.past = video_of("past", *past, c.batch, c.out, frames, c.rows, c.columns);
  c.past_scale = numbers_of("past_scale", past_scale, c.batch * all);
  c.last_scale = numbers_of("last_scale", last_scale, c.batch * all);
  return c;
}

// How the output pixels of one call are shared out: whole frames together where they are small, else rows of one.
struct Windows {
  explicit Windows(const Convolution& c)
      : frames(std::clamp(kTaskPixels / (c.rows * c.columns), int64_t{1}, c.frames)),
        rows(std::clamp(kTaskPixels / c.columns, int64_t{1}, c.rows)),
        down(ceil_of(c.rows, rows)), columns(c.columns) {}

  int64_t pixels() const { return frames * rows * columns; }
  // Of frames [first, end) of every batch item.
  int64_t count(const Convolution& c, int64_t first, int64_t end) const {
    return c.batch * ceil_of(end - first, frames) * down;
  }
  Window at(const Convolution& c, int64_t first, int64_t end, int64_t i) const {
    const int64_t along = ceil_of(end - first, frames), row = i % down * rows, frame = first + i / down % along * frames;
    return {i / down / along, frame, std::min(frames, end - frame), row, std::min(rows, c.rows - row)};
  }

  int64_t frames, rows, down, columns;
};

// Multiplications of all taps over all frames.
double work_of(const Convolution& c) {
  const int64_t passes = (c.kt - 1 + c.streams) * c.frames;
  return static_cast<double>(c.batch * passes * c.rows * c.columns) * static_cast<double>(c.ky * c.kx * c.in * c.out);
}

}  // namespace

void causal_conv3d_fwd_cpu(std::optional<Tensor> x, const Tensor& weight, std::optional<Tensor> past_scale,
                           std::optional<Tensor> last_scale, std::optional<Tensor> history, std::optional<Tensor> out,
                           std::optional<Tensor> past, double pad_value, int64_t frames, int64_t copies,
                           bool noisy_first) {
  STD_TORCH_CHECK(x ? out.has_value() : history && past, "out: must be there with x, history and past without");
  Convolution c = convolution_of(x ? *x : *history, x, weight, past_scale, last_scale, history, past, pad_value, frames,
                                 copies, noisy_first);
  if (out) c.y = video_of("out", *out, c.batch, c.out, c.streams * frames, c.rows, c.columns);
  if (c.batch * c.rows * c.columns == 0) return;
  const ConvolutionKernels& kernels = *cpu_kernels().convolution;
  const int64_t blocks = ceil_of(c.out, kernels.block);
  Workspace workspace;
  workspace.add(&c.packed, blocks * kernels.block * c.in * c.kt * c.ky * c.kx);
  workspace.allocate(weight);
  const double weights = static_cast<double>(weight.numel());
  run_tasks(blocks, weights, 0, [&](int64_t i, float*) { kernels.pack(c, i); });
  const Windows windows(c);
  run_tasks(windows.count(c, 0, c.frames) * blocks, work_of(c), kernels.scratch(c, windows.pixels()),
            [&](int64_t i, float* scratch) {
              kernels.forward(c, windows.at(c, 0, c.frames, i / blocks), i % blocks, scratch);
            });
}

void causal_conv3d_bwd_cpu(const Tensor& grad_out, std::optional<Tensor> x, const Tensor& weight,
                           std::optional<Tensor> past_scale, std::optional<Tensor> last_scale,
                           std::optional<Tensor> history, std::optional<Tensor> past, std::optional<Tensor> grad_x,
                           std::optional<Tensor> grad_weight, std::optional<Tensor> grad_past_scale,
                           std::optional<Tensor> grad_last_scale, std::optional<Tensor> grad_history, double pad_value,
                           int64_t frames, int64_t copies, bool noisy_first) {
  STD_TORCH_CHECK(x || (!grad_x && !grad_past_scale && !grad_last_scale), "x: must be there with its gradient");
  Convolution c = convolution_of(grad_out, x, weight, past_scale, last_scale, history, past, pad_value, frames, copies,
                                 noisy_first);
  const int64_t all = c.streams * frames, before = c.kt - 1;
  c.grad = video_of("grad_out", grad_out, c.batch, c.out, x ? all : 1, c.rows, c.columns);
  if (grad_x) c.grad_x = video_of("grad_x", *grad_x, c.batch, c.in, all, c.rows, c.columns);
  if (grad_history)
    c.grad_history = video_of("grad_history", *grad_history, c.batch, c.in, before, c.rows, c.columns);
  c.grad_weight = numbers_of("grad_weight", grad_weight, weight.numel());
  c.grad_past_scale = numbers_of("grad_past_scale", grad_past_scale, c.batch * all);
  float* const grad_last = numbers_of("grad_last_scale", grad_last_scale, c.batch * all);
  STD_TORCH_CHECK(!c.grad_past_scale || c.past.data, "past: must be there where grad_past_scale is");
  if (c.batch * c.rows * c.columns == 0) return;

  const ConvolutionKernels& kernels = *cpu_kernels().convolution;
  const Windows windows(c);
  const int64_t blocks = ceil_of(c.in, kernels.block), out_blocks = ceil_of(c.out, kernels.block);
  const bool of_past = before > 0 && (grad_x || grad_weight || grad_history);
  c.sums_streams = of_past && (c.streams > 1 || (c.streams == 1 && past_scale));
  c.total = c.grad;
  if (!c.sums_streams) c.total.data += c.clean_start * c.grad.frame;
  c.parts = windows.down * blocks;

  Workspace workspace;
  const bool of_frames = grad_x || grad_last, of_history = grad_history && before > 0;
  if (of_frames || of_history) workspace.add(&c.packed, blocks * kernels.block * c.out * c.kt * c.ky * c.kx);
  if (c.sums_streams) {
    workspace.add(&c.total.data, c.batch * frames * c.rows * c.columns * c.out);
    c.total.column = c.out;
    c.total.row = c.columns * c.total.column;
    c.total.frame = c.rows * c.total.row;
    c.total.batch = frames * c.total.frame;
  }
  if (grad_last) workspace.add(&c.dots, c.batch * all * c.parts);
  workspace.allocate(weight);

  const int64_t packs = c.packed ? blocks : 0, sums = c.sums_streams || c.grad_past_scale ? c.batch * frames : 0;
  const double moved = static_cast<double>(weight.numel() + (sums > 0 ? grad_out.numel() : 0));
  run_tasks(packs + sums, moved, 0, [&](int64_t i, float*) {
    if (i < packs) kernels.pack_turned(c, i);
    else kernels.sum_streams(c, (i - packs) / frames, (i - packs) % frames);
  });

  // The longest first: a tap's weight gradient walks through all frames of a sequence, or of the clean stream.
  const int64_t pieces = ceil_of(c.in, kGradientChannels), of_tap = out_blocks * pieces;
  const int64_t taps = c.grad_weight ? c.kt * of_tap : 0;
  const int64_t frame_windows = of_frames ? windows.count(c, 0, frames) : 0;
  const int64_t history_windows = of_history ? windows.count(c, -before, 0) : 0;
  run_tasks(taps + (frame_windows + history_windows) * blocks,
            work_of(c) * ((taps > 0 ? 1 : 0) + (frame_windows > 0 ? 1 : 0)), kernels.scratch(c, windows.pixels()),
            [&](int64_t i, float* scratch) {
              if (i < taps)
                return kernels.weight_gradient(c, c.kt - 1 - i / of_tap, i % of_tap / pieces, i % pieces,
                                               windows.frames, windows.rows, scratch);
              const int64_t block = (i - taps) % blocks, window = (i - taps) / blocks;
              if (window < frame_windows) {
                const Window w = windows.at(c, 0, frames, window);
                return kernels.data_gradient(c, w, block, w.row / windows.rows * blocks + block, scratch);
              }
              kernels.data_gradient(c, windows.at(c, -before, 0, window - frame_windows), block, 0, scratch);
            });
  for (int64_t f = 0; grad_last && f < c.batch * all; ++f) {
    double sum = 0;
    for (int64_t part = 0; part < c.parts; ++part) sum += c.dots[f * c.parts + part];
    grad_last[f] = static_cast<float>(sum);
  }
}

}  // namespace sae
