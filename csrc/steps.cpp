// The small steps between matrix products on the CPU: checks, then tasks in parallel. Tensors are dense and in one order
// of memory, as each op's cpp.py has made them.
#include "cpu_steps.h"

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <new>
#include <tuple>

#include "check.h"
#include "ops.h"

namespace sae {

namespace {

Type narrow_type(const char* name, const Tensor& t) {
  const Type type = type_of(name, t);
  STD_TORCH_CHECK(type != Type::f64, name, ": dtype must be float32, bfloat16 or float16, got float64");
  return type;
}

// The memory of a tensor that fills it without gaps.
void* dense(const char* name, const Tensor& t, Type type, int64_t size) {
  STD_TORCH_CHECK(type_of(name, t) == type, name, ": must have the dtype of the other tensors");
  if (size == 0 && t.numel() == 0) return nullptr;
  int64_t extent = 1;
  for (int64_t d = 0; d < t.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) <= 1 || t.stride(d) > 0, name, ": must have positive strides");
    if (t.size(d) > 1) extent += (t.size(d) - 1) * t.stride(d);
  }
  STD_TORCH_CHECK(t.numel() == size && extent == size, name, ": must be dense with ", size,
                  " elements, got shape ", shape_of(t));
  return t.data_ptr();
}

float* floats(const char* name, const Tensor& t, int64_t size) {
  return static_cast<float*>(dense(name, t, Type::f32, size));
}

int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

// Whether to write past the caches: where the last one would not hold a result until it is read. Time of a pass and of
// the next one over its result, on 2 cores with 32 MiB: 0.80 at 16 MiB, 0.92 at 8, 1.1 at 4. Whole vectors of all
// instruction sets must be aligned: each of `multiples` is a number of elements between places where one begins.
bool streams(Type type, int64_t size, std::initializer_list<const void*> outs,
             std::initializer_list<int64_t> multiples) {
  bool aligned = size * bytes_of(type) >= int64_t{8} << 20;
  for (const void* out : outs) aligned = aligned && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  for (const int64_t n : multiples) aligned = aligned && n % 16 == 0;
  return aligned;
}

// All tasks, of so many elements each, with scratch memory for each thread.
template <class Args>
void run(void (*kernel)(const Args&, float*, int64_t, int64_t), const Args& args, int64_t tasks, int64_t elements,
         int64_t scratch_size = 0) {
  // About 32k elements a thread: below that, waking one costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const auto free = [](float* p) { ::operator delete[](p, std::align_val_t(64)); };
    const std::unique_ptr<float[], decltype(free)> scratch(
        scratch_size == 0 ? nullptr
                          : static_cast<float*>(::operator new[](static_cast<size_t>(scratch_size) * sizeof(float),
                                                                 std::align_val_t(64))),
        free);
    kernel(args, scratch.get(), begin, end);
  });
}

const StepKernels& steps() { return *cpu_kernels().steps; }
const NormKernels& norms() { return *cpu_kernels().norms; }

void run_pointwise(void (*kernel)(const Pointwise&, float*, int64_t, int64_t), Pointwise& args) {
  args.stream = streams(args.type, args.size, {args.out[0], args.out[1]}, {});
  run(kernel, args, (args.size + kChunk - 1) / kChunk, kChunk);
}

}  // namespace

void mp_silu_cpu(const Tensor& x, std::optional<Tensor> grad_out, Tensor out) {
  Pointwise args;
  args.type = narrow_type("x", x);
  args.size = x.numel();
  args.in[0] = dense("x", x, args.type, args.size);
  args.out[0] = dense("out", out, args.type, args.size);
  if (grad_out) {
    args.in[1] = args.in[0];
    args.in[0] = dense("grad_out", *grad_out, args.type, args.size);
  }
  run_pointwise(grad_out ? steps().silu_backward : steps().silu, args);
}

void mp_sum_cpu(const Tensor& a, const Tensor& b, Tensor out, double weight_a, double weight_b,
                std::optional<double> limit) {
  Pointwise args;
  args.type = narrow_type("a", a);
  args.size = a.numel();
  args.in[0] = dense("a", a, args.type, args.size);
  args.in[1] = dense("b", b, args.type, args.size);
  args.out[0] = dense("out", out, args.type, args.size);
  args.factor[0] = static_cast<float>(weight_a);
  args.factor[1] = static_cast<float>(weight_b);
  args.limit = static_cast<float>(limit.value_or(0));
  run_pointwise(steps().sum, args);
}

void mp_sum_bwd_cpu(const Tensor& grad_out, std::optional<Tensor> out, std::optional<Tensor> grad_a,
                    std::optional<Tensor> grad_b, double weight_a, double weight_b, std::optional<double> limit) {
  Pointwise args;
  args.type = narrow_type("grad_out", grad_out);
  args.size = grad_out.numel();
  args.in[0] = dense("grad_out", grad_out, args.type, args.size);
  if (limit) {
    STD_TORCH_CHECK(out, "out: must be given with a limit");
    args.in[1] = dense("out", *out, args.type, args.size);
    args.limit = static_cast<float>(*limit);
  }
  int wanted = 0;
  for (const auto& [name, grad, weight] :
       {std::tuple{"grad_a", &grad_a, weight_a}, std::tuple{"grad_b", &grad_b, weight_b}}) {
    if (!*grad) continue;
    args.out[wanted] = dense(name, **grad, args.type, args.size);
    args.factor[wanted++] = static_cast<float>(weight);
  }
  if (wanted > 0) run_pointwise(steps().sum_backward, args);
}

void mp_cat_cpu(std::vector<Tensor> parts, Tensor whole, std::vector<double> weights, int64_t rows, bool backward) {
  STD_TORCH_CHECK(parts.size() == 2 && weights.size() == 2, "parts, weights: must be two, got ", parts.size(), " and ",
                  weights.size());
  Parts args;
  args.type = narrow_type("whole", whole);
  args.rows = rows;
  const int64_t size = whole.numel(), width = bytes_of(args.type);
  if (size == 0) return;
  STD_TORCH_CHECK(rows >= 1 && parts[0].numel() + parts[1].numel() == size && parts[0].numel() % rows == 0 &&
                      parts[1].numel() % rows == 0,
                  "parts: must make up whole, in ", rows, " rows, got shapes ", shape_of(parts[0]), " and ",
                  shape_of(parts[1]), " for ", shape_of(whole));
  char* at = static_cast<char*>(dense("whole", whole, args.type, size));
  args.stream = streams(args.type, size, {at}, {});
  for (int i = 0; i < 2; ++i) {
    const int64_t n = parts[i].numel() / rows;
    void* const part = dense("parts", parts[i], args.type, n * rows);
    args.part[i] = backward ? Part{at, part, size / rows, n, n, static_cast<float>(weights[i])}
                            : Part{part, at, n, size / rows, n, static_cast<float>(weights[i])};
    args.stream = args.stream && streams(args.type, size, {args.part[i].out}, {n});
    at += n * width;
  }
  const int64_t chunks = (size / rows + kPartChunk - 1) / kPartChunk;
  run(steps().parts, args, rows * chunks, std::min(size / rows, kPartChunk));
}

namespace {

Modulation modulation_of(const Tensor& x, const Tensor& scale, int64_t channels) {
  Modulation args;
  args.type = narrow_type("x", x);
  args.channels = channels;
  const int64_t groups = channels > 0 ? scale.numel() / channels : 0;
  STD_TORCH_CHECK(groups > 0 && groups * channels == scale.numel() && x.numel() % scale.numel() == 0,
                  "scale: must hold one number for each group and channel, got ", shape_of(scale), " and ", channels,
                  " channels");
  args.groups = groups;
  args.pixels = x.numel() / scale.numel();
  args.x = dense("x", x, args.type, x.numel());
  args.scale = floats("scale", scale, scale.numel());
  return args;
}

}  // namespace

void modulated_silu_cpu(const Tensor& x, const Tensor& scale, Tensor out, int64_t channels) {
  if (x.numel() == 0) return;
  Modulation args = modulation_of(x, scale, channels);
  args.out = dense("out", out, args.type, x.numel());
  const int64_t row = channels == 1 ? args.pixels : channels;
  args.stream = streams(args.type, x.numel(), {args.out}, {row});
  run(steps().modulate, args, x.numel() / row, row);
}

void modulated_silu_bwd_cpu(const Tensor& grad_out, const Tensor& x, const Tensor& scale, std::optional<Tensor> grad_x,
                            std::optional<Tensor> grad_scale, int64_t channels) {
  if (x.numel() == 0) return;
  Modulation args = modulation_of(x, scale, channels);
  args.grad = dense("grad_out", grad_out, args.type, x.numel());
  if (grad_x) args.out = dense("grad_x", *grad_x, args.type, x.numel());
  if (grad_scale) args.grad_scale = floats("grad_scale", *grad_scale, scale.numel());
  args.stream = streams(args.type, x.numel(), {args.out}, {channels == 1 ? args.pixels : channels});
  run(steps().modulate_backward, args, args.groups, args.pixels * channels, channels == 1 ? 0 : 2 * channels);
}

namespace {

Norm norm_of(const Tensor& x, const Tensor& rms, Tensor out, int64_t size, int64_t inner, double eps) {
  Norm args;
  args.type = narrow_type("x", x);
  STD_TORCH_CHECK(size >= 1 && inner >= 1 && x.numel() % (size * inner) == 0, "x: must hold vectors of ", size,
                  " elements, ", inner, " side by side, got ", shape_of(x));
  args.size = size;
  args.inner = inner;
  args.outer = x.numel() / (size * inner);
  args.eps = static_cast<float>(eps);
  args.x = dense("x", x, args.type, x.numel());
  args.rms = floats("rms", rms, args.outer * inner);
  args.out = dense("out", out, args.type, x.numel());
  return args;
}

void run_norm(void (*kernel)(const Norm&, float*, int64_t, int64_t), Norm& args, int64_t row_scratch,
              int64_t tile_copies) {
  if (args.outer == 0) return;
  args.stream = streams(args.type, args.outer * args.size * args.inner, {args.out, args.act},
                        {args.inner == 1 ? args.size : args.inner});
  if (args.inner == 1) {
    const int64_t rows = norm_rows(args.size);
    return run(kernel, args, (args.outer + rows - 1) / rows, rows * args.size, row_scratch);
  }
  const int64_t tile = norm_tile(args.size), tiles = (args.inner + tile - 1) / tile;
  run(kernel, args, args.outer * tiles, args.size * std::min(tile, args.inner),
      (2 + tile_copies * args.size) * tile);
}

}  // namespace

void pixel_norm_cpu(const Tensor& x, Tensor out, Tensor rms, std::optional<Tensor> act, int64_t size, int64_t inner,
                    double eps) {
  Norm args = norm_of(x, rms, out, size, inner, eps);
  if (act) args.act = dense("act", *act, args.type, x.numel());
  run_norm(norms().norm, args, 0, 1);
}

void pixel_norm_bwd_cpu(const Tensor& grad_out, std::optional<Tensor> grad_act, const Tensor& out,
                        const Tensor& rms, Tensor grad_x, int64_t size, int64_t inner, double eps) {
  Norm args = norm_of(out, rms, grad_x, size, inner, eps);
  args.grad = dense("grad_out", grad_out, args.type, out.numel());
  if (grad_act) args.grad_act = dense("grad_act", *grad_act, args.type, out.numel());
  run_norm(norms().norm_backward, args, grad_act ? norm_rows(size) * size : 0, 2);
}

namespace {

void strides_of(const char* name, const Tensor& t, const Tensor& like, Type type, int64_t* strides) {
  STD_TORCH_CHECK(t.dim() == 4 && type_of(name, t) == type, name, ": must have 4 dims and the dtype of the others");
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(t.size(d) == like.size(d), name, ": must have shape ", shape_of(like), ", got ", shape_of(t));
  STD_TORCH_CHECK(t.size(3) <= 1 || t.stride(3) == 1, name, ": must have a contiguous last dimension, got stride ",
                  t.stride(3));
  for (int64_t d = 0; d < 3; ++d) strides[d] = t.stride(d);
}

// Parts (B, H, S, D) to outs, of which those in the bit mask `normalized` have an entry in rms (and in ys, backward).
Heads heads_of(const std::vector<Tensor>& xs, const std::vector<Tensor>* ys, const std::vector<Tensor>& outs,
               const std::vector<Tensor>& rms, int64_t normalized, const std::optional<Tensor>& table,
               const std::vector<int64_t>& place, const std::vector<int64_t>& axes, const std::vector<int64_t>& sizes,
               bool interleaved, double eps) {
  STD_TORCH_CHECK(!xs.empty() && xs.size() <= 3 && outs.size() == xs.size() && xs[0].dim() == 4,
                  "parts: must be one to three of shape (B, H, S, D), as many as outs, got ", xs.size(), " and ",
                  outs.size());
  Heads args;
  args.type = narrow_type("parts", xs[0]);
  args.batch = xs[0].size(0);
  args.tokens = xs[0].size(2);
  args.dim = xs[0].size(3);
  args.eps = static_cast<float>(eps);
  args.interleaved = interleaved;
  args.parts = static_cast<int>(xs.size());
  args.tokens_first = xs[0].stride(1) < xs[0].stride(2);
  size_t with_rms = 0;
  int64_t elements = 0;
  args.stream = true;
  for (size_t i = 0; i < xs.size(); ++i) {
    HeadsOf& part = args.part[i];
    STD_TORCH_CHECK(xs[i].size(0) == args.batch && xs[i].size(2) == args.tokens && xs[i].size(3) == args.dim,
                    "parts: must agree but for heads, got ", shape_of(xs[i]));
    part.heads = xs[i].size(1);
    strides_of("parts", xs[i], xs[i], args.type, part.x_strides);
    strides_of("outs", outs[i], xs[i], args.type, part.out_strides);
    part.x = xs[i].data_ptr();
    part.out = outs[i].data_ptr();
    part.turned = table && i < 2;
    elements += xs[i].numel();
    for (const int64_t stride : part.out_strides) args.stream = args.stream && stride % 16 == 0;
    args.stream = args.stream && reinterpret_cast<uintptr_t>(part.out) % 64 == 0;
    if (!(normalized >> i & 1)) continue;
    STD_TORCH_CHECK(with_rms < rms.size() && (!ys || with_rms < ys->size()), "rms: must be one of each normalised part");
    const Tensor& r = rms[with_rms];
    STD_TORCH_CHECK(type_of("rms", r) == Type::f32 && r.dim() == 3 && r.size(0) == args.batch &&
                        r.size(1) == part.heads && r.size(2) == args.tokens && (args.tokens <= 1 || r.stride(2) == 1),
                    "rms: must be float32 (B, H, S), contiguous along S, got ", shape_of(r));
    part.rms = static_cast<float*>(r.data_ptr());
    for (int d = 0; d < 2; ++d) part.rms_strides[d] = r.stride(d);
    if (ys) {
      strides_of("outs", (*ys)[with_rms], xs[i], args.type, part.y_strides);
      part.y = (*ys)[with_rms].data_ptr();
    }
    ++with_rms;
  }
  args.stream = args.stream && streams(args.type, elements, {}, {args.dim});
  if (!table) return args;

  STD_TORCH_CHECK(place.size() == 3 && sizes.size() == axes.size() && !axes.empty() && axes.size() <= kMaxAxes,
                  "place, axes, sizes: must be 3 numbers and one or more, got ", place.size(), ", ", axes.size(), ", ",
                  sizes.size());
  args.frames = place[0];
  args.tokens_per_frame = place[1];
  args.width = place[2];
  args.axes = static_cast<int>(axes.size());
  int64_t numbers = 0;
  for (int i = 0; i < args.axes; ++i) {
    STD_TORCH_CHECK(axes[i] >= 0 && sizes[i] >= 1, "axes, sizes: must be at least 0 and 1");
    args.widths[i] = axes[i];
    args.sizes[i] = sizes[i];
    args.turned += axes[i];
    numbers += 2 * axes[i] * sizes[i];
  }
  if (args.frames > 0) {
    STD_TORCH_CHECK(args.axes == 1 || args.axes == 3, "axes: must be 1 or 3 of a layout, got ", args.axes);
    STD_TORCH_CHECK(args.tokens_per_frame >= 1 && args.width >= 1 && sizes[0] >= args.frames &&
                        (args.axes == 1 || (sizes[1] * args.width >= args.tokens_per_frame && sizes[2] >= args.width)),
                    "sizes: must reach every place of a layout");
  } else {
    STD_TORCH_CHECK(args.axes == 1 && (sizes[0] == args.tokens || sizes[0] == args.tokens * args.batch),
                    "sizes: must be those of the tokens, or of all tokens of the batch, got ", sizes[0]);
    args.table_batch = sizes[0] == args.tokens ? 0 : args.tokens;
  }
  STD_TORCH_CHECK((interleaved ? args.turned : 2 * args.turned) <= args.dim && args.turned % (interleaved ? 2 : 1) == 0,
                  "axes: must be of even sums, at most D = ", args.dim);
  check_contiguous("table", *table);
  args.table = floats("table", *table, numbers);
  args.stream = args.stream && args.turned % 16 == 0;
  return args;
}

void run_heads(void (*kernel)(const Heads&, float*, int64_t, int64_t), const Heads& args) {
  int64_t heads = 0;
  for (int i = 0; i < args.parts; ++i) heads += args.part[i].heads;
  run(kernel, args, args.batch * ((args.tokens + kHeadTokens - 1) / kHeadTokens), kHeadTokens * heads * args.dim,
      args.axes > 1 ? kHeadTokens * 2 * args.turned : 0);
}

}  // namespace

void qk_prepare_fwd_cpu(std::vector<Tensor> parts, std::vector<Tensor> outs, std::vector<Tensor> rms,
                        int64_t normalized, std::optional<Tensor> table, std::vector<int64_t> place,
                        std::vector<int64_t> axes, std::vector<int64_t> sizes, bool interleaved, double eps) {
  run_heads(norms().heads,
            heads_of(parts, nullptr, outs, rms, normalized, table, place, axes, sizes, interleaved, eps));
}

void qk_prepare_bwd_cpu(std::vector<Tensor> grads, std::vector<Tensor> outs, std::vector<Tensor> rms,
                        std::vector<Tensor> grad_parts, int64_t normalized, std::optional<Tensor> table,
                        std::vector<int64_t> place, std::vector<int64_t> axes, std::vector<int64_t> sizes,
                        bool interleaved, double eps) {
  run_heads(norms().heads_backward,
            heads_of(grads, &outs, grad_parts, rms, normalized, table, place, axes, sizes, interleaved, eps));
}

}  // namespace sae
