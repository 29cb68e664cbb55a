// The arguments of edm_loss, checked and laid out, for the CPU and for CUDA.
#pragma once

#include "check.h"

namespace sae {

// Forward if grad_loss is not given: then out is the loss; else out is the gradient of raw.
inline EdmLoss edm_loss_args(const Tensor& raw, const Tensor& x0, const Tensor& sigma, const Tensor& out,
                             const std::optional<Tensor>& grad_loss, int64_t streams, int64_t first_stream,
                             double sigma_data, int64_t seed, int64_t offset) {
  const int64_t copies = streams - 1;
  STD_TORCH_CHECK(copies >= 1 && first_stream >= 0 && first_stream <= 1,
                  "streams, first_stream: must be >= 2 and 0 or 1, got ", streams, ", ", first_stream);
  Frames frames(x0, copies, seed, offset);
  EdmLoss args;
  args.raw = frames.sequence("raw", raw, false);
  args.x0 = frames.data("x0", x0);
  args.frames = x0.size(1);
  args.noisy_streams = copies;
  args.first_stream = first_stream;
  args.sigma_data = sigma_data;
  const int64_t rows = x0.size(0) * copies * args.frames;
  args.frame_size = rows ? raw.numel() / rows : 0;
  check_contiguous("sigma", sigma);
  STD_TORCH_CHECK(type_of("sigma", sigma) == Type::f64 && sigma.numel() == rows, "sigma: must be float64 of ", rows,
                  " elements, got ", shape_of(sigma));
  args.sigma = static_cast<const double*>(sigma.data_ptr());
  check_contiguous("out", out);
  const Tensor& loss = grad_loss ? *grad_loss : out;
  check_contiguous("grad_loss", loss);
  STD_TORCH_CHECK(loss.numel() == rows, "loss: must have ", rows, " elements, got ", shape_of(loss));
  args.loss.data = loss.data_ptr();
  args.loss.type = type_of("loss", loss);
  if (grad_loss) {
    STD_TORCH_CHECK(out.numel() == raw.numel(), "out: must have the shape of raw, got ", shape_of(out));
    args.grad_raw.data = out.data_ptr();
    args.grad_raw.type = type_of("out", out);
  }
  frames.merge({&args.raw, &args.x0});
  args.space = frames.space;
  args.space.streams = streams;  // noise is counted over the whole sequence
  return args;
}

}  // namespace sae
