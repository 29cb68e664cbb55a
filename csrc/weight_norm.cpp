// Forced weight normalisation of a list of weights in one parallel pass.
#include <algorithm>
#include <vector>

#include "check.h"
#include "ops.h"

namespace sae {

void normalize_weights_cpu(std::vector<Tensor> weights, std::vector<Tensor> copies, std::vector<double> gains,
                           double eps) {
  const std::vector<Weight> all = weights_of(weights, copies, gains);
  // Elements before each weight: threads share the elements evenly, whatever weights they lie in.
  std::vector<int64_t> first = {0};
  for (const Weight& weight : all) first.push_back(first.back() + weight.rows * weight.fan_in);
  // About 64k elements a thread: below that, waking one costs more than it saves.
  constexpr int64_t kGrain = 1 << 16;
  const Kernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, first.back(), kGrain, [&](int64_t begin, int64_t end) {
    // A row belongs to the thread whose range holds its first element.
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; i < all.size() && first[i] < end; ++i) {
      const auto row = [&](int64_t element) {
        return std::clamp((element - first[i] + all[i].fan_in - 1) / all[i].fan_in, int64_t{0}, all[i].rows);
      };
      kernels.weight_rows(all[i], static_cast<float>(eps), row(std::max(begin, first[i])), row(end));
    }
  });
}

}  // namespace sae
