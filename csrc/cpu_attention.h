// frame_attention's inner loops, compiled once for each instruction set, behind one table of functions.
//
// As cpu_kernels.h: nothing here or in what it includes is shared between the code of two instruction sets.
#pragma once

#include "cpu_kernels.h"
#include "frame_intervals.h"

namespace sae {

// Rows of a task forward and of a step backward; keys of a task backward; keys that one task packs.
constexpr int64_t kRowTile = 64, kKeyTile = 128, kPackKeys = 256;

// (batch, head, row, dim), the last contiguous; strides in elements.
struct Rows {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t heads = 1;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

struct Attention {
  Sequence sequence;
  int64_t batch, heads, group;  // query heads; those that share a key head
  int64_t rows, keys;           // of one head
  int64_t dim, width;           // head dim, and in floats of packed rows: padded to whole vectors with zeros
  float scale;
  Rows q, k, v, out, grad_out, dq, dk, dv;
  float* lse;  // (batch, heads, rows), natural logarithm

  // Forward: keys in panels, values in rows, of each (batch, key head).
  float *panels = nullptr, *values = nullptr;
  // Backward: sums for dq in rows, of each (batch, query head); nullptr: dq itself takes them.
  float* dq_rows = nullptr;
  int32_t* turns = nullptr;  // (batch, heads, row stream, row tile): tiles of keys done
};

struct AttentionKernels {
  int64_t lanes, panel;  // floats of a vector; keys of a panel
  int64_t (*forward_scratch)(const Attention&);  // floats of a thread
  int64_t (*backward_scratch)(const Attention&);
  // Heads count (batch, head); streams are numbered clean, noisy 1..K, and tiles along a stream.
  void (*pack_keys)(const Attention&, int64_t key_head, int64_t part, float* scratch);
  void (*attend)(const Attention&, int64_t head, int64_t stream, int64_t row_tile, float* scratch);
  void (*attend_backward)(const Attention&, int64_t key_head, int64_t stream, int64_t key_tile, float* scratch);
};

}  // namespace sae
