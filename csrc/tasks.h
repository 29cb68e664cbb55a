// Memory and threads of one call on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "cpu_kernels.h"

namespace sae {

// What a thread must have to do to be worth waking, in multiplications: about 20 microseconds.
constexpr double kWorthWaking = 1e6;

// Floats for all that a call keeps between tasks, from PyTorch's allocator; parts begin at multiples of 64 bytes.
class Workspace {
 public:
  void add(float** part, int64_t size) {
    parts_.push_back({part, total_});
    total_ += (size + 15) / 16 * 16;
  }
  void allocate(const torch::stable::Tensor& like) {
    memory_ = torch::stable::new_empty(like, {total_ + 16}, torch::headeronly::ScalarType::Float);
    const uintptr_t start = (reinterpret_cast<uintptr_t>(memory_.data_ptr()) + 63) / 64 * 64;
    for (const auto& [part, at] : parts_) *part = reinterpret_cast<float*>(start) + at;
  }

 private:
  torch::stable::Tensor memory_;
  std::vector<std::pair<float**, int64_t>> parts_;
  int64_t total_ = 0;
};

// Tasks in order, the next one to whichever thread is free; each thread has scratch of its own. `work` in
// multiplications: no more threads than it is worth.
template <class Task>
void run_tasks(int64_t tasks, double work, int64_t scratch_size, const Task& task) {
  std::atomic<int64_t> next{0};
  const double threads = std::max(1.0, work / kWorthWaking);
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(tasks) / threads));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t, int64_t) {
    const auto free = [](float* p) { ::operator delete[](p, std::align_val_t(64)); };
    const std::unique_ptr<float[], decltype(free)> scratch(
        static_cast<float*>(::operator new[](static_cast<size_t>(scratch_size) * 4, std::align_val_t(64))), free);
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(i, scratch.get());
  });
}

}  // namespace sae
