// One fault for each sanitizer to find: proof that what finds nothing in csrc would find something.
#include <cstdint>

extern "C" int32_t torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

extern "C" int read_beyond(const int32_t* values, int64_t count) { return values[count]; }

extern "C" int overflow(int32_t value) { return value + 1; }

extern "C" int shift_too_far(int32_t bits) { return 1 << bits; }

// Every part of the loop adds to the same number.
extern "C" int race(int32_t* total) {
  torch_parallel_for(
      0, 9, 1, [](int64_t begin, int64_t end, void* sum) { *static_cast<int32_t*>(sum) += int32_t(end - begin); }, total);
  return *total;
}
