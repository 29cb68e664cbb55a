// token_noise on CUDA: one thread makes kWidth neighbouring elements of every stream, reading x once.
//
// The fast kernel moves 16 bytes of output at a time, for scales that are constant along the innermost dim (one for
// each frame, say); the general one takes any strides and scales, one element at a time. Both give the numbers of the
// CPU: the build turns contraction off, and madd is a fused multiply-add.
#include <algorithm>

#include "device.cuh"
#include "token_noise.h"

namespace sae {
namespace {

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth <= 16 ? sizeof(T) * kWidth : 16) Pack {
  T v[kWidth];
};

// Every kWidth neighbours lie in one run of the innermost dim with one pair of scales, start on 16 bytes of output, and
// on a group of four.
template <class In, class Out, bool kNoise>
__global__ void __launch_bounds__(kThreads) token_noise_fwd_kernel(const __grid_constant__ NoiseForward task) {
  constexpr int kWidth = 16 / sizeof(Out);
  const Space& space = task.space;
  const int64_t vectors = space.length / kWidth;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= vectors * space.batches) return;
  const int64_t b = index / vectors, j = (index - b * vectors) * kWidth;
  const In* from = static_cast<const In*>(task.x.data) + b * task.x.batch + inner_offset(space, task.x, j);
  const Pack<In, kWidth> x = *reinterpret_cast<const Pack<In, kWidth>*>(from);
  const int64_t signal_at = b * task.signal.batch + inner_offset(space, task.signal, j);
  const int64_t scale_at = b * task.noise_scale.batch + inner_offset(space, task.noise_scale, j);
  for (int64_t r = 0; r < space.streams; ++r) {
    const int64_t element = (b * space.streams + r) * space.length + j;
    Pack<Out, kWidth> out, noise;
    const float signal = read<float>(task.signal, signal_at + r * task.signal.stream);
    const float scale = read<float>(task.noise_scale, scale_at + r * task.noise_scale.stream);
#pragma unroll
    for (int group = 0; group < kWidth / 4; ++group) {
      float z[4];
      four_normals(space, static_cast<uint64_t>(element) / 4 + group, z);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * group + i;
        out.v[at] = narrow<Out>(madd(signal, widen(x.v[at]), scale * z[i]));
        if constexpr (kNoise) noise.v[at] = narrow<Out>(z[i]);
      }
    }
    *reinterpret_cast<Pack<Out, kWidth>*>(static_cast<Out*>(task.out.data) + element) = out;
    if constexpr (kNoise) *reinterpret_cast<Pack<Out, kWidth>*>(static_cast<Out*>(task.noise.data) + element) = noise;
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads) token_noise_fwd_any_kernel(const __grid_constant__ NoiseForward task) {
  const Space& space = task.space;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= space.length * space.batches) return;
  const int64_t b = index / space.length, j = index - b * space.length;
  const C x = read<C>(task.x, b * task.x.batch + inner_offset(space, task.x, j));
  const int64_t signal_at = b * task.signal.batch + inner_offset(space, task.signal, j);
  const int64_t scale_at = b * task.noise_scale.batch + inner_offset(space, task.noise_scale, j);
  for (int64_t r = 0; r < space.streams; ++r) {
    const int64_t element = (b * space.streams + r) * space.length + j;
    const C z = static_cast<C>(one_normal(space, element));
    const C signal = read<C>(task.signal, signal_at + r * task.signal.stream);
    const C scale = read<C>(task.noise_scale, scale_at + r * task.noise_scale.stream);
    write(task.out, element, madd(signal, x, scale * z));
    if (task.noise.data) write(task.noise, element, z);
  }
}

__global__ void __launch_bounds__(kThreads) token_noise_eps_kernel(const __grid_constant__ NoiseForward task) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, first = 4 * group;
  if (first >= task.space.length) return;
  float z[4];
  four_normals(task.space, static_cast<uint64_t>(group), z);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (first + i < task.space.length) write(task.out, first + i, z[i]);
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    token_noise_grad_x_kernel(const __grid_constant__ Space space, const __grid_constant__ Operand grad_out,
                              const __grid_constant__ Operand signal, const __grid_constant__ Operand grad_x) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= space.length * space.batches) return;
  const int64_t b = index / space.length, j = index - b * space.length;
  const int64_t grad_at = b * grad_out.batch + inner_offset(space, grad_out, j);
  const int64_t signal_at = b * signal.batch + inner_offset(space, signal, j);
  C sum = 0;
  for (int64_t r = 0; r < space.streams; ++r)
    sum = madd(read<C>(grad_out, grad_at + r * grad_out.stream), read<C>(signal, signal_at + r * signal.stream), sum);
  write(grad_x, index, sum);
}

// The index (b, r, j) cut into the dims along which a scale's gradient is kept and those it is summed over.
constexpr int kAllDims = kMaxDims + 2;
struct Cut {
  int dims = 0;
  int64_t count = 1;
  int64_t sizes[kAllDims], grad[kAllDims], other[kAllDims], element[kAllDims], target[kAllDims];
};
struct Place {
  int64_t grad = 0, other = 0, element = 0, target = 0;
};

__device__ __forceinline__ Place place(const Cut& cut, int64_t index) {
  Place at;
#pragma unroll 1
  for (int d = cut.dims - 1; d >= 0; --d) {
    const int64_t quotient = index / cut.sizes[d], i = index - quotient * cut.sizes[d];
    at.grad += i * cut.grad[d];
    at.other += i * cut.other[d];
    at.element += i * cut.element[d];
    at.target += i * cut.target[d];
    index = quotient;
  }
  return at;
}

// One block sums one element of the gradient, its threads always the same terms in the same order: no atomics.
// `other` is x, or nothing: then the factor is eps.
template <class C>
__global__ void __launch_bounds__(kThreads, 2)  // without the 2, ptxas spills on sm_120
    token_noise_grad_scale_kernel(const __grid_constant__ Space space, const __grid_constant__ Cut kept,
                                  const __grid_constant__ Cut summed, const __grid_constant__ Operand grad_out,
                                  const __grid_constant__ Operand other, double* sums) {
  for (int64_t target = blockIdx.x; target < kept.count; target += gridDim.x) {
    const Place base = place(kept, target);
    double sum = 0;
    for (int64_t i = threadIdx.x; i < summed.count; i += kThreads) {
      const Place at = place(summed, i);
      const C grad = read<C>(grad_out, base.grad + at.grad);
      const C factor = other.data ? read<C>(other, base.other + at.other)
                                  : static_cast<C>(one_normal(space, base.element + at.element));
      sum += static_cast<double>(grad * factor);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[base.target] = sum;
  }
}

// ---- host

int64_t bytes_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Whether every vector of `width` elements lies in one run, aligned to 16 bytes (or to its size, if that is less).
bool vectorises(const NoiseForward& task, int64_t width) {
  const Space& space = task.space;
  const int last = space.dims - 1;
  if (task.x.type == Type::f64 || task.out.type == Type::f64) return false;
  if (space.sizes[last] % width || space.length % 4) return false;
  if (task.x.inner[last] != 1 || task.signal.inner[last] || task.noise_scale.inner[last]) return false;
  const int64_t alignment = std::min<int64_t>(16, width * bytes_of(task.x.type));
  auto aligned = [](const void* data, int64_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; };
  bool strides = task.x.batch * bytes_of(task.x.type) % alignment == 0;
  for (int d = 0; d < last; ++d) strides = strides && task.x.inner[d] * bytes_of(task.x.type) % alignment == 0;
  return strides && aligned(task.x.data, alignment) && aligned(task.out.data, 16) && aligned(task.noise.data, 16);
}

template <class In, class Out>
void launch_fast(const NoiseForward& task, cudaStream_t stream) {
  const unsigned blocks = Launch::blocks(task.space.batches * (task.space.length / (16 / sizeof(Out))));
  if (task.noise.data) token_noise_fwd_kernel<In, Out, true><<<blocks, kThreads, 0, stream>>>(task);
  else token_noise_fwd_kernel<In, Out, false><<<blocks, kThreads, 0, stream>>>(task);
}
template <class In>
void launch_fast_out(const NoiseForward& task, cudaStream_t stream) {
  switch (task.out.type) {
    case Type::f32: return launch_fast<In, float>(task, stream);
    case Type::bf16: return launch_fast<In, __nv_bfloat16>(task, stream);
    default: return launch_fast<In, __half>(task, stream);
  }
}

void token_noise_fwd_cuda(const Tensor& x, const Tensor& signal_scale, const Tensor& noise_scale, Tensor out,
                          std::optional<Tensor> noise, int64_t streams, int64_t seed, int64_t offset) {
  const NoiseForward task = noise_forward_args(x, signal_scale, noise_scale, out, noise, streams, seed, offset);
  STD_TORCH_CHECK(!noise || task.noise.type == task.out.type, "noise: must have the dtype of out");
  if (task.space.length == 0 || task.space.batches == 0) return;
  Launch launch(x);
  if (vectorises(task, 16 / bytes_of(task.out.type))) {
    switch (task.x.type) {
      case Type::f32: launch_fast_out<float>(task, launch.stream); break;
      case Type::bf16: launch_fast_out<__nv_bfloat16>(task, launch.stream); break;
      default: launch_fast_out<__half>(task, launch.stream); break;
    }
  } else {
    const unsigned blocks = Launch::blocks(task.space.batches * task.space.length);
    if (task.x.type == Type::f64) token_noise_fwd_any_kernel<double><<<blocks, kThreads, 0, launch.stream>>>(task);
    else token_noise_fwd_any_kernel<float><<<blocks, kThreads, 0, launch.stream>>>(task);
  }
  Launch::check();
}

void token_noise_eps_cuda(Tensor out, int64_t seed, int64_t offset) {
  check_contiguous("out", out);
  NoiseForward task;
  task.space.length = out.numel();
  task.space.seed = static_cast<uint64_t>(seed);
  task.space.offset = static_cast<uint64_t>(offset);
  task.out.data = out.data_ptr();
  task.out.type = type_of("out", out);
  if (task.space.length == 0) return;
  Launch launch(out);
  token_noise_eps_kernel<<<Launch::blocks((task.space.length + 3) / 4), kThreads, 0, launch.stream>>>(task);
  Launch::check();
}

template <class C>
void scale_gradient(const Frames& frames, const Operand& grad_out, const Operand& other, const Operand& target,
                    double* sums, cudaStream_t stream) {
  const Space& space = frames.space;
  Cut kept, summed;
  auto add = [&](int64_t size, int64_t grad, int64_t from, int64_t element, int64_t to) {
    Cut& cut = to == 0 ? summed : kept;
    if (size == 1) return;
    const int d = cut.dims++;
    cut.count *= cut.sizes[d] = size;
    cut.grad[d] = grad;
    cut.other[d] = from;
    cut.element[d] = element;
    cut.target[d] = to;
  };
  add(space.batches, grad_out.batch, other.batch, space.streams * space.length, target.batch);
  add(space.streams, grad_out.stream, 0, space.length, target.stream);
  int64_t element = space.length;
  for (int d = 0; d < space.dims; ++d) {
    element /= space.sizes[d];
    add(space.sizes[d], grad_out.inner[d], other.inner[d], element, target.inner[d]);
  }
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(kept.count, 1 << 20));
  token_noise_grad_scale_kernel<C><<<blocks, kThreads, 0, stream>>>(space, kept, summed, grad_out, other, sums);
  Launch::check();
}

void token_noise_bwd_cuda(const Tensor& grad_out, const Tensor& x, const Tensor& signal_scale,
                          std::optional<Tensor> grad_x, std::optional<Tensor> sum_signal,
                          std::optional<Tensor> sum_noise, int64_t streams, int64_t seed, int64_t offset) {
  Frames frames(x, streams, seed, offset);
  const Operand grad = frames.sequence("grad_out", grad_out, false), data = frames.data("x", x);
  const Operand signal = frames.sequence("signal_scale", signal_scale, true);
  if (frames.space.length == 0 || frames.space.batches == 0) return;
  Launch launch(x);
  const bool fp64 = data.type == Type::f64;
  if (grad_x) {
    const Operand result = noise_grad_x(frames, *grad_x, x);
    const unsigned blocks = Launch::blocks(frames.space.batches * frames.space.length);
    if (fp64)
      token_noise_grad_x_kernel<double><<<blocks, kThreads, 0, launch.stream>>>(frames.space, grad, signal, result);
    else token_noise_grad_x_kernel<float><<<blocks, kThreads, 0, launch.stream>>>(frames.space, grad, signal, result);
    Launch::check();
  }
  for (const auto& [name, sum, other] :
       {std::tuple{"sum_signal", &sum_signal, data}, std::tuple{"sum_noise", &sum_noise, Operand{}}}) {
    if (!*sum) continue;
    const Operand target = noise_sum(frames, name, **sum, x);
    double* sums = static_cast<double*>((*sum)->data_ptr());
    if (fp64) scale_gradient<double>(frames, grad, other, target, sums, launch.stream);
    else scale_gradient<float>(frames, grad, other, target, sums, launch.stream);
  }
}

}  // namespace
}  // namespace sae

STABLE_TORCH_LIBRARY_IMPL(sae_kernels_native, CUDA, m) {
  m.impl("token_noise_fwd", TORCH_BOX(&sae::token_noise_fwd_cuda));
  m.impl("token_noise_bwd", TORCH_BOX(&sae::token_noise_bwd_cuda));
  m.impl("token_noise_eps", TORCH_BOX(&sae::token_noise_eps_cuda));
}
