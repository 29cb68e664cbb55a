// frame_attention on the CPU: checks, then tasks in a fixed order, which the threads take one after the other.
#include "cpu_attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>

#include "check.h"
#include "ops.h"
#include "tasks.h"

namespace sae {

namespace {

Rows rows_of(const char* name, const Tensor& t, int64_t batch, int64_t heads, int64_t rows, int64_t dim, Type type) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batch && t.size(1) == heads && t.size(2) == rows && t.size(3) == dim,
                  name, ": must have shape (", batch, ", ", heads, ", ", rows, ", ", dim, "), got ", shape_of(t));
  STD_TORCH_CHECK(dim <= 1 || t.stride(3) == 1, name, ": must have a contiguous last dimension, got stride ",
                  t.stride(3));
  STD_TORCH_CHECK(type_of(name, t) == type, name, ": must have the dtype of q");
  return {t.data_ptr(), type, heads, t.stride(0), t.stride(1), t.stride(2)};
}

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse, const Sequence& sequence,
                       double scale) {
  STD_TORCH_CHECK(sequence.tokens >= 1 && sequence.block >= 1 && sequence.copies >= 0 && sequence.sink >= 0,
                  "tokens, block, copies, sink: must be at least 1, 1, 0, 0");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.size(1) >= 1 && q.size(1) % k.size(1) == 0,
                  "q, k: must have shape (B, Hq, Sq, D) and (B, Hkv, S, D), Hkv a divisor of Hq, got ", shape_of(q),
                  " and ", shape_of(k));
  const Type type = type_of("q", q);
  STD_TORCH_CHECK(type != Type::f64, "q: dtype must be float32, bfloat16 or float16, got float64");
  Attention a;
  a.sequence = sequence;
  a.batch = q.size(0);
  a.heads = q.size(1);
  a.group = a.heads / k.size(1);
  a.keys = (1 + sequence.copies) * sequence.tokens;
  a.rows = sequence.noisy_rows_only ? sequence.copies * sequence.tokens : a.keys;
  a.dim = q.size(3);
  const int64_t lanes = cpu_kernels().attention->lanes;
  a.width = ceil_div(a.dim, lanes) * lanes;
  a.scale = static_cast<float>(scale);
  a.q = rows_of("q", q, a.batch, a.heads, a.rows, a.dim, type);
  a.k = rows_of("k", k, a.batch, k.size(1), a.keys, a.dim, type);
  a.v = rows_of("v", v, a.batch, k.size(1), a.keys, a.dim, type);
  check_contiguous("lse", lse);
  STD_TORCH_CHECK(lse.numel() == a.batch * a.heads * a.rows && type_of("lse", lse) == Type::f32,
                  "lse: must be float32 (B, Hq, Sq), got shape ", shape_of(lse));
  a.lse = static_cast<float*>(lse.data_ptr());
  return a;
}

Sequence sequence_of(int64_t tokens, int64_t block, int64_t copies, bool noisy_first, int64_t window, int64_t sink,
                     bool noisy_queries_only) {
  return {tokens, block, copies, noisy_first ? copies * tokens : 0, noisy_first ? 0 : tokens, window, sink,
          noisy_queries_only};
}

// Tasks numbered in an order in which none waits for a later one. Each head's first `packing` tasks make what the
// others of the head read; a count for each head says how many are done. As many heads as there are threads advance
// together: those of one head share a cache, and wait for each other where they add to the same rows.
template <class Task>
void run_in_order(int64_t heads, int64_t packing, int64_t others, double work, int64_t scratch_size, const Task& task) {
  const int64_t of_head = packing + others, tasks = heads * of_head;
  const std::unique_ptr<std::atomic<int64_t>[]> packed(new std::atomic<int64_t>[static_cast<size_t>(heads)]());
  std::atomic<int64_t> next{0};
  const int64_t together = std::min<int64_t>(heads, torch::stable::get_num_threads());
  const double threads = std::max(1.0, work / kWorthWaking);
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(tasks) / threads));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t, int64_t) {
    const auto free = [](float* p) { ::operator delete[](p, std::align_val_t(64)); };
    const std::unique_ptr<float[], decltype(free)> scratch(
        static_cast<float*>(::operator new[](static_cast<size_t>(scratch_size) * 4, std::align_val_t(64))), free);
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) {
      const int64_t first = i / (together * of_head) * together, count = std::min(together, heads - first);
      const int64_t head = first + (i - first * of_head) % count, j = (i - first * of_head) / count;
      if (j >= packing)
        for (int spins = 0; packed[head].load(std::memory_order_acquire) < packing; ++spins)
          if (spins >= 1000) std::this_thread::yield();
      task(head, j, scratch.get());
      if (j < packing) packed[head].fetch_add(1, std::memory_order_release);
    }
  });
}

// Multiplications of one product of all rows with their keys, roughly.
double work_of(const Attention& a) {
  const Sequence& s = a.sequence;
  const double seen = s.window < 0 ? 0.5 * static_cast<double>(s.tokens)
                                   : std::min(0.5 * static_cast<double>(s.tokens),
                                              static_cast<double>(s.block) * static_cast<double>(s.window + s.sink));
  return static_cast<double>(a.batch * a.heads * a.rows * a.dim) * (seen + static_cast<double>(s.block));
}

}  // namespace

void frame_attention_fwd_cpu(const Tensor& q, const Tensor& k, const Tensor& v, Tensor out, Tensor lse, int64_t tokens,
                             int64_t block, int64_t copies, bool noisy_first, int64_t window, int64_t sink,
                             double scale, bool noisy_queries_only) {
  Attention a = attention_of(
      q, k, v, lse, sequence_of(tokens, block, copies, noisy_first, window, sink, noisy_queries_only), scale);
  a.out = rows_of("out", out, a.batch, a.heads, a.rows, a.dim, a.q.type);
  const AttentionKernels& kernels = *cpu_kernels().attention;
  const int64_t key_heads = a.batch * a.heads / a.group;
  if (key_heads * a.rows * a.dim == 0) return;
  Workspace workspace;
  workspace.add(&a.panels, key_heads * ceil_div(a.keys, kernels.panel) * kernels.panel * a.dim);
  workspace.add(&a.values, key_heads * a.keys * a.width);
  workspace.allocate(q);
  // The last rows of a stream see most.
  const int64_t from = noisy_queries_only ? 1 : 0, streams = 1 + copies - from, tiles = ceil_div(tokens, kRowTile);
  const int64_t parts = ceil_div(a.keys, kPackKeys);
  run_in_order(key_heads, parts, tiles * streams * a.group, 2 * work_of(a), kernels.forward_scratch(a),
               [&](int64_t head, int64_t j, float* scratch) {
                 if (j < parts) return kernels.pack_keys(a, head, j, scratch);
                 j -= parts;
                 const int64_t tile = tiles - 1 - j / (streams * a.group), rest = j % (streams * a.group);
                 kernels.attend(a, head * a.group + rest / streams, from + rest % streams, tile, scratch);
               });
}

void frame_attention_bwd_cpu(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& out, const Tensor& lse, Tensor dq, Tensor dk, Tensor dv, int64_t tokens,
                             int64_t block, int64_t copies, bool noisy_first, int64_t window, int64_t sink,
                             double scale, bool noisy_queries_only) {
  Attention a = attention_of(
      q, k, v, lse, sequence_of(tokens, block, copies, noisy_first, window, sink, noisy_queries_only), scale);
  a.out = rows_of("out", out, a.batch, a.heads, a.rows, a.dim, a.q.type);
  a.grad_out = rows_of("grad_out", grad_out, a.batch, a.heads, a.rows, a.dim, a.q.type);
  a.dq = rows_of("dq", dq, a.batch, a.heads, a.rows, a.dim, a.q.type);
  a.dk = rows_of("dk", dk, a.batch, k.size(1), a.keys, a.dim, a.q.type);
  a.dv = rows_of("dv", dv, a.batch, k.size(1), a.keys, a.dim, a.q.type);
  const AttentionKernels& kernels = *cpu_kernels().attention;
  const int64_t heads = a.batch * a.heads, key_heads = heads / a.group;
  if (key_heads * a.keys * a.dim == 0) return;
  const int64_t row_tiles = ceil_div(tokens, kRowTile), key_tiles = ceil_div(tokens, kKeyTile);
  Workspace workspace;
  float* turns;
  workspace.add(&turns, heads * (1 + copies) * row_tiles);
  if (a.q.type != Type::f32 || a.width != a.dim) workspace.add(&a.dq_rows, heads * a.rows * a.width);
  workspace.allocate(q);
  a.turns = reinterpret_cast<int32_t*>(turns);
  std::fill_n(a.turns, heads * (1 + copies) * row_tiles, 0);
  // Clean keys first, and the first of them, which most rows see.
  run_in_order(key_heads, 0, key_tiles * (1 + copies), 5 * work_of(a), kernels.backward_scratch(a),
               [&](int64_t head, int64_t j, float* scratch) {
                 kernels.attend_backward(a, head, j / key_tiles, j % key_tiles, scratch);
               });
}

}  // namespace sae
