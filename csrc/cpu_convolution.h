// causal_conv3d's inner loops, compiled once for each instruction set, behind one table of functions.
//
// As cpu_kernels.h: nothing here or in what it includes is shared between the code of two instruction sets.
#pragma once

#include "cpu_kernels.h"

namespace sae {

// Output pixels of a task, about: their sums and one tap's weights stay in the first two caches.
constexpr int64_t kTaskPixels = 256;
// Input channels whose weight gradient is one task.
constexpr int64_t kGradientChannels = 128;

// (batch, frame, row, column, channel) in fp32, the channels contiguous; strides in elements.
struct Video {
  float* data = nullptr;
  int64_t batch = 0, frame = 0, row = 0, column = 0;
};

// Frames [frame, frame + frames) of a batch item, rows [row, row + rows) of each: one task's output pixels.
struct Window {
  int64_t batch, frame, frames, row, rows;
};

struct Convolution {
  int64_t batch, frames, streams;   // clean frames; streams with the clean one, 0 where the past term alone is meant
  int64_t clean_start, noisy_start;  // their first frames in the sequence
  int64_t rows, columns, in, out;    // of the map; channels
  int64_t kt, ky, kx;
  float pad;                         // the frames before frame 0 without history

  Video x, y, history, past;         // past (frames of the clean stream), like history, may have no data
  const float *past_scale, *last_scale;  // (batch, frames of the sequence) or nullptr
  const float* weight;               // (out, in, kt, ky, kx)

  // Forward: for each block of output channels (tap, in, block); backward, for each block of input channels, the spatial
  // taps turned around: (tap, out, block).
  float* packed;

  // Backward. What is not wanted has no data.
  Video grad, grad_x, grad_history;
  Video total;                       // the past_scale-weighted sum of grad over the streams, (batch, frames of one)
  bool sums_streams;                 // total is to be made, and not a view of grad
  float *grad_weight, *grad_past_scale;
  float* dots;  // (batch, frames of the sequence, parts): sums of x times the data gradient; nullptr: not wanted
  int64_t parts;
};

struct ConvolutionKernels {
  int64_t block;  // channels of a block, the last may be of half as many
  int64_t (*scratch)(const Convolution&, int64_t pixels);  // floats of a thread, for windows of at most so many pixels
  void (*pack)(const Convolution&, int64_t block);
  void (*pack_turned)(const Convolution&, int64_t block);
  void (*forward)(const Convolution&, const Window&, int64_t block, float* scratch);
  // `part`: which of `parts` this window and block fill.
  void (*data_gradient)(const Convolution&, const Window&, int64_t block, int64_t part, float* scratch);
  void (*sum_streams)(const Convolution&, int64_t batch, int64_t frame);
  // Windows of `frames` frames of `rows` rows; `first` counts input channels in kGradientChannels.
  void (*weight_gradient)(const Convolution&, int64_t tap, int64_t block, int64_t first, int64_t frames, int64_t rows,
                          float* scratch);
};

}  // namespace sae
