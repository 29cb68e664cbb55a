// Memory-safety checks and the reading of tensors; the Python side has checked the meaning of the arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu_kernels.h"

namespace sae {

using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

inline Type type_of(const char* name, const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    case ScalarType::Double: return Type::f64;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": dtype must be float32, bfloat16, float16 or float64, got another");
}

inline void check_contiguous(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": must be contiguous, got strides that are not, shape ", shape_of(t));
}

// Weights (Cout, ...) in fp32 with their copies, none or one of each; those without elements are left out.
inline std::vector<Weight> weights_of(const std::vector<Tensor>& weights, const std::vector<Tensor>& copies,
                                      const std::vector<double>& gains) {
  STD_TORCH_CHECK(copies.empty() || copies.size() == weights.size(), "copies: must be none or as many as weights = ",
                  weights.size(), ", got ", copies.size());
  STD_TORCH_CHECK(copies.empty() || gains.size() == weights.size(), "gains: must be as many as weights = ",
                  weights.size(), ", got ", gains.size());
  std::vector<Weight> result;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check_contiguous("weights", w);
    STD_TORCH_CHECK(type_of("weights", w) == Type::f32, "weights: dtype must be float32");
    STD_TORCH_CHECK(w.dim() >= 2, "weights: must have shape (Cout, ...), got ", shape_of(w));
    if (w.numel() == 0) continue;
    Weight weight{static_cast<float*>(w.mutable_data_ptr()), nullptr, Type::f32, 1.0f, w.size(0), 0};
    weight.fan_in = w.numel() / weight.rows;
    if (!copies.empty()) {
      check_contiguous("copies", copies[i]);
      STD_TORCH_CHECK(copies[i].numel() == w.numel(), "copies: must have the shapes of the weights, got ",
                      shape_of(copies[i]), " for ", shape_of(w));
      weight.copy = copies[i].mutable_data_ptr();
      weight.copy_type = type_of("copies", copies[i]);
      weight.gain = static_cast<float>(gains[i]);
    }
    result.push_back(weight);
  }
  return result;
}

// Weights with the gradients of their copies and of themselves, one of each; those without elements are left out.
inline std::vector<WeightGradient> weight_gradients_of(const std::vector<Tensor>& grads,
                                                       const std::vector<Tensor>& weights,
                                                       const std::vector<Tensor>& grad_weights,
                                                       const std::vector<double>& gains) {
  STD_TORCH_CHECK(grads.size() == weights.size() && grad_weights.size() == weights.size() &&
                      gains.size() == weights.size(),
                  "grads, grad_weights, gains: must be as many as weights = ", weights.size());
  std::vector<WeightGradient> result;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &w = weights[i], &grad = grads[i], &grad_w = grad_weights[i];
    check_contiguous("weights", w);
    check_contiguous("grads", grad);
    check_contiguous("grad_weights", grad_w);
    STD_TORCH_CHECK(type_of("weights", w) == Type::f32 && type_of("grad_weights", grad_w) == Type::f32,
                    "weights, grad_weights: dtype must be float32");
    STD_TORCH_CHECK(w.dim() >= 2, "weights: must have shape (Cout, ...), got ", shape_of(w));
    STD_TORCH_CHECK(grad.numel() == w.numel() && grad_w.numel() == w.numel(),
                    "grads, grad_weights: must have the shapes of the weights, got ", shape_of(grad), " and ",
                    shape_of(grad_w), " for ", shape_of(w));
    if (w.numel() == 0) continue;
    result.push_back({static_cast<const float*>(w.const_data_ptr()), grad.const_data_ptr(), type_of("grads", grad),
                      static_cast<float*>(grad_w.mutable_data_ptr()), static_cast<float>(gains[i]), w.size(0),
                      w.numel() / w.size(0)});
  }
  return result;
}

// The index space of an output (B, R T, rest...) over data x (B, T, rest...).
class Frames {
 public:
  Frames(const Tensor& x, int64_t streams, int64_t seed, int64_t offset) : x_(x), streams_(streams) {
    STD_TORCH_CHECK(x.dim() >= 2 && x.dim() <= kMaxDims + 1, "x: must have 2 to ", kMaxDims + 1, " dims, got shape ",
                    shape_of(x));
    STD_TORCH_CHECK(streams >= 1, "streams: must be >= 1, got ", streams);
    space.batches = x.size(0);
    space.streams = streams;
    space.length = 1;
    space.dims = static_cast<int>(x.dim()) - 1;
    for (int d = 0; d < space.dims; ++d) space.length *= space.sizes[d] = x.size(d + 1);
    space.seed = static_cast<uint64_t>(seed);
    space.offset = static_cast<uint64_t>(offset);
  }

  // Data (B, T, rest...), the same for every stream.
  Operand data(const char* name, const Tensor& t) const {
    check_size(name, t, x_.size(1));
    Operand result = at(name, t);
    for (int d = 0; d < space.dims; ++d) result.inner[d] = t.stride(d + 1);
    return result;
  }

  // A sequence (B, R T, rest...), or a tensor that broadcasts to it.
  Operand sequence(const char* name, const Tensor& t, bool broadcasts) const {
    const int64_t frames = x_.size(1), all = streams_ * frames;
    STD_TORCH_CHECK(t.dim() == x_.dim(), name, ": must have the rank of x ", shape_of(x_), ", got ", shape_of(t));
    for (int64_t d = 0; d < t.dim(); ++d) {
      const int64_t want = d == 1 ? all : x_.size(d);
      STD_TORCH_CHECK(t.size(d) == want || (broadcasts && t.size(d) == 1), name, ": dim ", d, " must be ", want,
                      ", got shape ", shape_of(t));
    }
    Operand result = at(name, t);
    result.batch = t.size(0) == 1 ? 0 : t.stride(0);
    for (int d = 0; d < space.dims; ++d) result.inner[d] = t.size(d + 1) == 1 ? 0 : t.stride(d + 1);
    result.stream = t.size(1) == 1 ? 0 : frames * t.stride(1);
    return result;
  }

  void check_size(const char* name, const Tensor& t, int64_t frames) const {
    bool same = t.dim() == x_.dim();
    for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == (d == 1 ? frames : x_.size(d));
    STD_TORCH_CHECK(same, name, ": must have the shape of x ", shape_of(x_), " with ", frames, " frames, got ",
                    shape_of(t));
  }

  // Joins neighbouring dims that every operand walks through without a jump.
  void merge(std::initializer_list<Operand*> operands) {
    int kept = 0;
    for (int d = 1; d < space.dims; ++d) {
      if (space.sizes[d] == 1) continue;
      bool joined = true;
      for (const Operand* o : operands) joined = joined && o->inner[kept] == o->inner[d] * space.sizes[d];
      if (joined || space.sizes[kept] == 1) space.sizes[kept] *= space.sizes[d];
      else space.sizes[++kept] = space.sizes[d];
      for (Operand* o : operands) o->inner[kept] = o->inner[d];
    }
    space.dims = kept + 1;
  }

  Space space;

 private:
  static Operand at(const char* name, const Tensor& t) {
    Operand result;
    result.data = t.data_ptr();
    result.type = type_of(name, t);
    result.batch = t.dim() > 0 ? t.stride(0) : 0;
    return result;
  }

  const Tensor& x_;
  int64_t streams_;
};

}  // namespace sae
