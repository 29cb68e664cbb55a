// token_noise: its arguments, checked, as both devices take them.
#pragma once

#include "check.h"

namespace sae {

inline NoiseForward noise_forward_args(const Tensor& x, const Tensor& signal_scale, const Tensor& noise_scale,
                                       const Tensor& out, const std::optional<Tensor>& noise, int64_t streams,
                                       int64_t seed, int64_t offset) {
  Frames frames(x, streams, seed, offset);
  NoiseForward args;
  args.x = frames.data("x", x);
  args.signal = frames.sequence("signal_scale", signal_scale, true);
  args.noise_scale = frames.sequence("noise_scale", noise_scale, true);
  args.out = frames.sequence("out", out, false);
  check_contiguous("out", out);
  if (noise) {
    args.noise = frames.sequence("noise", *noise, false);
    check_contiguous("noise", *noise);
  }
  frames.merge({&args.x, &args.signal, &args.noise_scale});
  args.space = frames.space;
  return args;
}

inline Operand noise_grad_x(const Frames& frames, const Tensor& grad_x, const Tensor& x) {
  frames.check_size("grad_x", grad_x, x.size(1));
  check_contiguous("grad_x", grad_x);
  Operand result;
  result.data = grad_x.data_ptr();
  result.type = type_of("grad_x", grad_x);
  return result;
}

// The first of the slabs (slabs, ...) in fp64 that a scale's gradient is summed in.
inline Operand noise_sum(const Frames& frames, const char* name, const Tensor& sum, const Tensor& x) {
  check_contiguous(name, sum);
  STD_TORCH_CHECK(type_of(name, sum) == Type::f64 && sum.dim() == x.dim() + 1 && sum.size(0) > 0, name,
                  ": must be float64 of shape (slabs, ...) with the rank of x + 1, got ", shape_of(sum));
  return frames.sequence(name, torch::stable::select(sum, 0, 0), true);
}

}  // namespace sae
