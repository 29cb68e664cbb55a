// Forced weight normalisation of a list of weights in one parallel pass.
#include <vector>

#include "check.h"
#include "ops.h"

namespace sae {

void normalize_weights_cpu(std::vector<Tensor> weights, std::vector<Tensor> copies, std::vector<double> gains,
                           double eps) {
  struct Job {
    Weight weight;
    int64_t begin, end;
  };
  // About 64k elements a job: large ones are cut by rows, so that threads finish together.
  constexpr int64_t kElements = 1 << 16;
  std::vector<Job> jobs;
  for (const Weight& weight : weights_of(weights, copies, gains)) {
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
