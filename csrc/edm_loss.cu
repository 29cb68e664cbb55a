// edm_loss on CUDA: one block a noisy frame, one thread a group of four normals.
#include "device.cuh"
#include "edm_loss.h"

namespace sae {
namespace {

template <class C>
__global__ void __launch_bounds__(kThreads, 2) edm_loss_kernel(const __grid_constant__ EdmLoss args) {
  const Space& space = args.space;
  const int64_t row = blockIdx.x, t = row % args.frames, r = row / args.frames % args.noisy_streams;
  const int64_t b = row / args.frames / args.noisy_streams, size = args.frame_size;
  const double sigma = args.sigma[row], d = args.sigma_data, total = hypot(sigma, d);
  const C data_scale = static_cast<C>(sigma == 0 ? nan("") : sigma / total / d);
  const C noise_scale = static_cast<C>(d / total);
  const bool backward = args.grad_raw.data != nullptr;
  const C factor = backward ? read<C>(args.loss, row) * static_cast<C>(2.0 / static_cast<double>(size)) : C(0);
  const int64_t start = (b * space.streams + args.first_stream + r) * space.length + t * size;
  const int64_t raw_at = b * args.raw.batch + r * args.raw.stream, data_at = b * args.x0.batch;
  double sum = 0;
  for (int64_t group = start / 4 + threadIdx.x; group * 4 < start + size; group += kThreads) {
    float z[4];
    four_normals(space, static_cast<uint64_t>(group), z);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t p = 4 * group + i - start;
      if (p < 0 || p >= size) continue;
      const int64_t j = t * size + p;
      const C raw = read<C>(args.raw, raw_at + inner_offset(space, args.raw, j));
      const C data = read<C>(args.x0, data_at + inner_offset(space, args.x0, j));
      const C error = madd(noise_scale, static_cast<C>(z[i]), madd(-data_scale, data, raw));
      if (backward) write(args.grad_raw, row * size + p, error * factor);
      else sum += static_cast<double>(error) * static_cast<double>(error);
    }
  }
  if (backward) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) write(args.loss, row, sum / static_cast<double>(size));
}

void edm_loss_cuda(const Tensor& raw, const Tensor& x0, const Tensor& sigma, Tensor out,
                   std::optional<Tensor> grad_loss, int64_t streams, int64_t first_stream, double sigma_data,
                   int64_t seed, int64_t offset) {
  if (raw.numel() == 0) return;
  const EdmLoss args =
      edm_loss_args(raw, x0, sigma, out, grad_loss, streams, first_stream, sigma_data, seed, offset);
  const int64_t rows = raw.numel() / args.frame_size;
  Launch launch(raw);
  const unsigned blocks = Launch::blocks(rows * kThreads);
  if (args.raw.type == Type::f64) edm_loss_kernel<double><<<blocks, kThreads, 0, launch.stream>>>(args);
  else edm_loss_kernel<float><<<blocks, kThreads, 0, launch.stream>>>(args);
  Launch::check();
}

}  // namespace
}  // namespace sae

STABLE_TORCH_LIBRARY_IMPL(sae_kernels_native, CUDA, m) { m.impl("edm_loss", TORCH_BOX(&sae::edm_loss_cuda)); }
