// edm_loss on the CPU: one row of the parallel loop is one noisy frame.
#include "edm_loss.h"

#include "ops.h"

namespace sae {

void edm_loss_cpu(const Tensor& raw, const Tensor& x0, const Tensor& sigma, Tensor out, std::optional<Tensor> grad_loss,
                  int64_t streams, int64_t first_stream, double sigma_data, int64_t seed, int64_t offset) {
  if (raw.numel() == 0) return;
  const EdmLoss args =
      edm_loss_args(raw, x0, sigma, out, grad_loss, streams, first_stream, sigma_data, seed, offset);
  const int64_t rows = raw.numel() / args.frame_size;
  const bool fp64 = args.raw.type == Type::f64;
  const Kernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, rows, 32768 / args.frame_size + 1, [&](int64_t begin, int64_t end) {
    kernels.edm_loss(args, fp64, begin, end);
  });
}

}  // namespace sae
