// torch's parallel loop as plain threads, which ThreadSanitizer follows; it cannot see into OpenMP's. Preloaded, this
// takes the place of torch's own. The parts are thirds whatever the grain, so that small tensors have neighbours too.
#include <cstdint>
#include <thread>
#include <vector>

namespace {
constexpr int kThreads = 3;
thread_local uint32_t index = 0;
}  // namespace

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                                      void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    const int64_t from = begin + (end - begin) * i / kThreads, to = begin + (end - begin) * (i + 1) / kThreads;
    if (from < to)
      threads.emplace_back([=] {
        index = static_cast<uint32_t>(i);
        body(from, to, context);
      });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

extern "C" int32_t torch_get_thread_idx(uint32_t* out) {
  *out = index;
  return 0;
}

extern "C" int32_t torch_get_num_threads(uint32_t* out) {
  *out = kThreads;
  return 0;
}
