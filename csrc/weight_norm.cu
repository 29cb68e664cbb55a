// Normalisation of a list of weights on CUDA, and its gradient: one block a row, one launch for kMost weights.
#include <vector>

#include "device.cuh"

namespace sae {
namespace {

// 256 descriptions are 14 to 16 KiB of the 32 KiB that a kernel's arguments may take (CUDA 12.1 and later).
constexpr int kMost = 256;

template <class Item>
struct List {
  int count = 0;
  Item items[kMost];
  int64_t first_row[kMost + 1] = {};

  // The item that a block's row lies in.
  __device__ const Item& of(int64_t block, int64_t& row) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_row[middle] <= block) low = middle;
      else high = middle - 1;
    }
    row = block - first_row[low];
    return items[low];
  }
};

__global__ void __launch_bounds__(kThreads)
    normalize_weights_kernel(const __grid_constant__ List<Weight> list, double eps, bool in_place) {
  int64_t row;
  const Weight& weight = list.of(blockIdx.x, row);
  const int64_t n = weight.fan_in, at = row * n;
  float* w = weight.data + at;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += static_cast<double>(w[i]) * w[i];
  const double rms = sqrt(block_sum(sum) / static_cast<double>(n));
  const double gain = weight.gain / sqrt(static_cast<double>(n));
  const float scale = in_place ? static_cast<float>(1.0 / (rms + eps)) : 1.0f;
  const float factor = static_cast<float>(gain / ((in_place ? rms / (rms + eps) : rms) + eps));
  Operand copy;
  copy.data = weight.copy;
  copy.type = weight.copy_type;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float value = w[i] * scale;
    if (in_place) w[i] = value;
    if (weight.copy) write(copy, at + i, value * factor);
  }
}

__global__ void __launch_bounds__(kThreads)
    normalize_weights_bwd_kernel(const __grid_constant__ List<WeightGradient> list, double eps) {
  int64_t row;
  const WeightGradient& weight = list.of(blockIdx.x, row);
  const int64_t n = weight.fan_in, at = row * n;
  const float* w = weight.w + at;
  Operand grad;
  grad.data = const_cast<void*>(weight.grad);
  grad.type = weight.grad_type;
  double squares = 0, dot = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    squares += static_cast<double>(w[i]) * w[i];
    dot += static_cast<double>(w[i]) * read<float>(grad, at + i);
  }
  squares = block_sum(squares);
  dot = block_sum(dot);
  const double rms = sqrt(squares / static_cast<double>(n));
  const double scale = weight.gain / (sqrt(static_cast<double>(n)) * (rms + eps));
  const float along = rms == 0 ? 0.0f : static_cast<float>(-dot * scale / ((rms + eps) * rms * static_cast<double>(n)));
  const float across = static_cast<float>(scale);
  for (int64_t i = threadIdx.x; i < n; i += kThreads)
    weight.grad_w[at + i] = fmaf(w[i], along, read<float>(grad, at + i) * across);
}

// Calls launch(list, blocks) for every kMost items.
template <class Item, class Function>
void for_lists(const std::vector<Item>& all, const Function& launch) {
  for (size_t first = 0; first < all.size(); first += kMost) {
    List<Item> list;
    for (size_t i = first; i < all.size() && list.count < kMost; ++i) {
      list.items[list.count] = all[i];
      list.first_row[list.count + 1] = list.first_row[list.count] + all[i].rows;
      ++list.count;
    }
    launch(list, Launch::blocks(list.first_row[list.count] * kThreads));
    Launch::check();
  }
}

void normalize_weights_cuda(std::vector<Tensor> weights, std::vector<Tensor> copies, std::vector<double> gains,
                            double eps, bool in_place) {
  STD_TORCH_CHECK(in_place || copies.size() == weights.size(), "copies: must be as many as weights = ", weights.size(),
                  ", got ", copies.size());
  for_lists(weights_of(weights, copies, gains), [&](const List<Weight>& list, unsigned blocks) {
    Launch launch(weights[0]);
    normalize_weights_kernel<<<blocks, kThreads, 0, launch.stream>>>(list, eps, in_place);
  });
}

void normalize_weights_bwd_cuda(std::vector<Tensor> grads, std::vector<Tensor> weights,
                                std::vector<Tensor> grad_weights, std::vector<double> gains, double eps) {
  for_lists(weight_gradients_of(grads, weights, grad_weights, gains),
            [&](const List<WeightGradient>& list, unsigned blocks) {
              Launch launch(weights[0]);
              normalize_weights_bwd_kernel<<<blocks, kThreads, 0, launch.stream>>>(list, eps);
            });
}

}  // namespace
}  // namespace sae

STABLE_TORCH_LIBRARY_IMPL(sae_kernels_native, CUDA, m) {
  m.impl("normalize_weights", TORCH_BOX(&sae::normalize_weights_cuda));
  m.impl("normalize_weights_bwd", TORCH_BOX(&sae::normalize_weights_bwd_cuda));
}
