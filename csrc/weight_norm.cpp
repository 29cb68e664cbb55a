// Normalisation of a list of weights, and its gradient, each in one parallel pass.
#include <algorithm>
#include <vector>

#include "check.h"
#include "ops.h"

namespace sae {

namespace {

// Calls rows(weight, begin, end) from several threads, which share the elements evenly, whatever weights they lie in.
template <class Item, class Function>
void for_rows(const std::vector<Item>& all, const Function& rows) {
  std::vector<int64_t> first = {0};  // elements before each weight
  for (const Item& item : all) first.push_back(first.back() + item.rows * item.fan_in);
  // About 64k elements a thread: below that, waking one costs more than it saves.
  constexpr int64_t kGrain = 1 << 16;
  torch::stable::parallel_for(0, first.back(), kGrain, [&](int64_t begin, int64_t end) {
    // A row belongs to the thread whose range holds its first element.
    size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; i < all.size() && first[i] < end; ++i) {
      const auto row = [&](int64_t element) {
        return std::clamp((element - first[i] + all[i].fan_in - 1) / all[i].fan_in, int64_t{0}, all[i].rows);
      };
      rows(all[i], row(std::max(begin, first[i])), row(end));
    }
  });
}

}  // namespace

void normalize_weights_cpu(std::vector<Tensor> weights, std::vector<Tensor> copies, std::vector<double> gains,
                           double eps, bool in_place) {
  STD_TORCH_CHECK(in_place || copies.size() == weights.size(), "copies: must be as many as weights = ", weights.size(),
                  ", got ", copies.size());
  const Kernels& kernels = cpu_kernels();
  for_rows(weights_of(weights, copies, gains), [&](const Weight& weight, int64_t begin, int64_t end) {
    kernels.weight_rows(weight, static_cast<float>(eps), in_place, begin, end);
  });
}

void normalize_weights_bwd_cpu(std::vector<Tensor> grads, std::vector<Tensor> weights, std::vector<Tensor> grad_weights,
                               std::vector<double> gains, double eps) {
  const Kernels& kernels = cpu_kernels();
  for_rows(weight_gradients_of(grads, weights, grad_weights, gains),
           [&](const WeightGradient& weight, int64_t begin, int64_t end) {
             kernels.weight_rows_backward(weight, static_cast<float>(eps), begin, end);
           });
}

}  // namespace sae
