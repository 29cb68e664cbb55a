// Forced weight normalisation of a list of weights on CUDA: one block a row, one launch for kMost weights.
#include <vector>

#include "device.cuh"

namespace sae {
namespace {

// 256 descriptions are 14 KiB of the 32 KiB that a kernel's arguments may take (CUDA 12.1 and later).
constexpr int kMost = 256;

struct List {
  int count = 0;
  Weight weights[kMost];
  int64_t first_row[kMost + 1] = {};
};

__global__ void __launch_bounds__(kThreads) normalize_weights_kernel(const __grid_constant__ List list, double eps) {
  int low = 0, high = list.count - 1;
  const int64_t block = blockIdx.x;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.first_row[middle] <= block) low = middle;
    else high = middle - 1;
  }
  const Weight& weight = list.weights[low];
  const int64_t n = weight.fan_in, at = (block - list.first_row[low]) * n;
  float* w = weight.data + at;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += static_cast<double>(w[i]) * w[i];
  const double rms = sqrt(block_sum(sum) / static_cast<double>(n));
  const float scale = static_cast<float>(1.0 / (rms + eps));
  const double again = rms / (rms + eps);
  const float factor = static_cast<float>(weight.gain / (sqrt(static_cast<double>(n)) * (again + eps)));
  Operand copy;
  copy.data = weight.copy;
  copy.type = weight.copy_type;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float value = w[i] * scale;
    w[i] = value;
    if (weight.copy) write(copy, at + i, value * factor);
  }
}

void normalize_weights_cuda(std::vector<Tensor> weights, std::vector<Tensor> copies, std::vector<double> gains,
                            double eps) {
  const std::vector<Weight> all = weights_of(weights, copies, gains);
  for (size_t first = 0; first < all.size(); first += kMost) {
    List list;
    for (size_t i = first; i < all.size() && list.count < kMost; ++i) {
      list.weights[list.count] = all[i];
      list.first_row[list.count + 1] = list.first_row[list.count] + all[i].rows;
      ++list.count;
    }
    Launch launch(weights[0]);
    const unsigned blocks = Launch::blocks(list.first_row[list.count] * kThreads);
    normalize_weights_kernel<<<blocks, kThreads, 0, launch.stream>>>(list, eps);
    Launch::check();
  }
}

}  // namespace
}  // namespace sae

STABLE_TORCH_LIBRARY_IMPL(sae_kernels_native, CUDA, m) {
  m.impl("normalize_weights", TORCH_BOX(&sae::normalize_weights_cuda));
}
