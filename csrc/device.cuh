// What the CUDA kernels share: element access by run-time type, the noise of an element, launches on torch's stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "check.h"
#include "philox.h"

namespace sae {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }

template <class C>
__device__ __forceinline__ C read(const Operand& from, int64_t at) {
  switch (from.type) {
    case Type::f32: return static_cast<C>(static_cast<const float*>(from.data)[at]);
    case Type::bf16: return static_cast<C>(widen(static_cast<const __nv_bfloat16*>(from.data)[at]));
    case Type::f16: return static_cast<C>(widen(static_cast<const __half*>(from.data)[at]));
    default: return static_cast<C>(static_cast<const double*>(from.data)[at]);
  }
}
template <class C>
__device__ __forceinline__ void write(const Operand& to, int64_t at, C value) {
  switch (to.type) {
    case Type::f32: static_cast<float*>(to.data)[at] = static_cast<float>(value); break;
    case Type::bf16: static_cast<__nv_bfloat16*>(to.data)[at] = __float2bfloat16_rn(static_cast<float>(value)); break;
    case Type::f16: static_cast<__half*>(to.data)[at] = __float2half_rn(static_cast<float>(value)); break;
    default: static_cast<double*>(to.data)[at] = static_cast<double>(value);
  }
}

// Offset of index j along the inner dims. With fewer than 2^32 elements, as usual, the division is a short one.
__device__ __forceinline__ int64_t inner_offset(const Space& space, const Operand& operand, int64_t j) {
  int64_t at = 0;
#pragma unroll 1
  for (int d = space.dims - 1; d > 0; --d) {
    const int64_t size = space.sizes[d];
    int64_t quotient;
    if ((j | size) >> 32) quotient = j / size;
    else quotient = static_cast<uint32_t>(j) / static_cast<uint32_t>(size);
    at += (j - quotient * size) * operand.inner[d];
    j = quotient;
  }
  return at + j * operand.inner[0];
}

__device__ __forceinline__ void four_normals(const Space& space, uint64_t group, float* z) {
  const Words w = philox(group, space.offset, space.seed);
  box_muller(w.w0, w.w1, z[0], z[1]);
  box_muller(w.w2, w.w3, z[2], z[3]);
}

__device__ __forceinline__ float one_normal(const Space& space, int64_t element) {
  const Words w = philox(static_cast<uint64_t>(element) / 4, space.offset, space.seed);
  const bool second = element & 2;
  float z0, z1;
  box_muller(second ? w.w2 : w.w0, second ? w.w3 : w.w1, z0, z1);
  return element & 1 ? z1 : z0;
}

// The sum over a block of kThreads threads, in one fixed order, in every thread.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double partial[kThreads];
  partial[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = partial[0];
  __syncthreads();
  return sum;
}

// torch's current stream. The function lives in libtorch_cuda, which a CPU build of torch, against which this is linked
// too, does not have: so it is looked up among the libraries already loaded.
cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter, "libtorch_cuda.so is not loaded, or does not tell its current stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Launch {
  explicit Launch(const Tensor& t) : guard(t.get_device_index()), stream(current_stream(t.get_device_index())) {}
  static unsigned blocks(int64_t threads) {
    const int64_t count = (threads + kThreads - 1) / kThreads;
    STD_TORCH_CHECK(count < (int64_t{1} << 31), "too many threads for one launch, got ", threads);
    return static_cast<unsigned>(count);
  }
  static void check() {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "the launch failed: ", cudaGetErrorString(error));
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

}  // namespace
}  // namespace sae
