// Forced weight normalisation of a list of weights in one parallel pass.
#include <vector>

#include "check.h"
#include "ops.h"

namespace sae {

void normalize_weights_cpu(std::vector<Tensor> weights, std::vector<Tensor> copies, std::vector<double> gains,
                           double eps) {
  STD_TORCH_CHECK(copies.empty() || copies.size() == weights.size(), "copies: must be none or as many as weights = ",
                  weights.size(), ", got ", copies.size());
  STD_TORCH_CHECK(copies.empty() || gains.size() == weights.size(), "gains: must be as many as weights = ",
                  weights.size(), ", got ", gains.size());
  struct Job {
    Weight weight;
    int64_t begin, end;
  };
  // About 64k elements a job: large ones are cut by rows, so that threads finish together.
  constexpr int64_t kElements = 1 << 16;
  std::vector<Job> jobs;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    check_contiguous("weights", w);
    STD_TORCH_CHECK(type_of("weights", w) == Type::f32, "weights: dtype must be float32");
    STD_TORCH_CHECK(w.dim() >= 2, "weights: must have shape (Cout, ...), got ", shape_of(w));
    Weight weight{static_cast<float*>(w.mutable_data_ptr()), nullptr, Type::f32, 1.0f, w.size(0), 0};
    if (w.numel() == 0) continue;
    weight.fan_in = w.numel() / weight.rows;
    if (!copies.empty()) {
      check_contiguous("copies", copies[i]);
      STD_TORCH_CHECK(copies[i].numel() == w.numel(), "copies: must have the shapes of the weights, got ",
                      shape_of(copies[i]), " for ", shape_of(w));
      weight.copy = copies[i].mutable_data_ptr();
      weight.copy_type = type_of("copies", copies[i]);
      weight.gain = static_cast<float>(gains[i]);
    }
    const int64_t step = kElements / weight.fan_in + 1;
    for (int64_t row = 0; row < weight.rows; row += step)
      jobs.push_back({weight, row, row + step < weight.rows ? row + step : weight.rows});
  }
  const Kernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.weight_rows(jobs[i].weight, static_cast<float>(eps), jobs[i].begin, jobs[i].end);
  });
}

}  // namespace sae
