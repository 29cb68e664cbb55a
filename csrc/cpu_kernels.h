// What is compiled once for each instruction set: the inner loops, behind one table of functions.
//
// This header and cpu_kernels.cpp include nothing that defines functions shared with other files, so that no code made
// for AVX-512 can be linked into a path that an older processor takes.
#pragma once

#include <cstdint>

namespace sae {

constexpr int kMaxDims = 8;
// Elements that one step of a loop works on: a handful of fp32 buffers of this size stay in a 32 KiB first-level cache.
constexpr int64_t kChunk = 1024;

enum class Type : int32_t { f32, bf16, f16, f64 };

// A tensor read or written at the indices (b, r, j): batch, stream, and j counting frame and everything inside it.
// Strides are in elements, 0 where the tensor broadcasts.
struct Operand {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t batch = 0, stream = 0;
  int64_t inner[kMaxDims] = {};
};

// The index space: `sizes` are those of j, outermost first, and multiply to `length`.
struct Space {
  int64_t batches = 0, streams = 0, length = 0;
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  uint64_t seed = 0, offset = 0;

  int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
  int64_t jobs() const { return batches * chunks(); }
};

struct NoiseForward {
  Space space;
  Operand x, signal, noise_scale, out;
  Operand noise;  // data == nullptr: not wanted
};

struct NoiseBackward {
  Space space;
  Operand grad_out, x, signal;
  Operand grad_x;                    // data == nullptr: not wanted, as below
  Operand grad_signal, grad_noise;   // data: fp64 sums, `slabs` copies, slab_* elements each
  int64_t slabs = 1, slab_signal = 0, slab_noise = 0;
};

// loss = sum over a frame of (raw - data_scale x0 + noise_scale eps)^2 / size, one job a row (batch, noisy frame).
struct EdmLoss {
  Operand raw, x0;             // at (batch, noisy stream, j); raw of the noisy streams alone
  Space space;                 // streams of the whole sequence
  int64_t frames = 0, frame_size = 0, first_stream = 0, noisy_streams = 0;
  const double* sigma = nullptr;  // (batches, noisy_streams, frames)
  double sigma_data = 1;
  Operand loss;                // forward: fp32 or fp64 (batches, noisy_streams, frames); backward: its gradient
  Operand grad_raw;            // data == nullptr: forward
};

struct Weight {
  float* data;        // (rows, fan_in)
  void* copy;         // the scaled compute copy, or nullptr
  Type copy_type;
  float gain;
  int64_t rows, fan_in;
};

// grad_w = c / d (grad - w <grad, w> / (d n rms)) for each row, c = gain / sqrt(n), d = rms + eps; 0 <grad, w> if rms = 0.
struct WeightGradient {
  const float* w;     // (rows, fan_in), as the copy was made from it
  const void* grad;   // of the scaled compute copy
  Type grad_type;
  float* grad_w;
  float gain;
  int64_t rows, fan_in;
};

struct AttentionKernels;    // cpu_attention.h
struct ConvolutionKernels;  // cpu_convolution.h
struct StepKernels;         // cpu_steps.h
struct NormKernels;         // cpu_steps.h

struct Kernels {
  const char* name;
  const AttentionKernels* attention;
  const ConvolutionKernels* convolution;
  const StepKernels* steps;
  const NormKernels* norms;
  void (*noise_forward)(const NoiseForward&, bool fp64, int64_t begin, int64_t end);
  void (*noise_backward)(const NoiseBackward&, bool fp64, int64_t slab);
  void (*noise_grad_x)(const NoiseBackward&, bool fp64, int64_t begin, int64_t end);
  void (*eps)(void* out, Type type, int64_t count, uint64_t seed, uint64_t offset, int64_t begin, int64_t end);
  void (*edm_loss)(const EdmLoss&, bool fp64, int64_t begin, int64_t end);
  void (*weight_rows)(const Weight&, float eps, bool in_place, int64_t begin, int64_t end);
  void (*weight_rows_backward)(const WeightGradient&, float eps, int64_t begin, int64_t end);
};

// The fastest set this processor runs; SAE_CPU_CAPABILITY=baseline|avx2 asks for a lesser one.
const Kernels& cpu_kernels();

}  // namespace sae
