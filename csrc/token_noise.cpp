// token_noise on the CPU: checks, then the inner loops over chunks in parallel.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "token_noise.h"

#include "ops.h"

namespace sae {

namespace {

bool in_fp64(const Tensor& x) { return type_of("x", x) == Type::f64; }

// About 32k elements a thread: below that, waking one costs more than it saves.
constexpr int64_t kGrain = 32;

// Ask for huge pages before the first write to a large, fresh output: faulting 4 KiB pages took 77 ms of CPU time of
// 112 for 128 MiB. A hint; memory already touched, and systems without huge pages, ignore it.
void prefer_huge_pages(const Tensor& t) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2u << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last >= first + 4 * kPage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

void token_noise_fwd_cpu(const Tensor& x, const Tensor& signal_scale, const Tensor& noise_scale, Tensor out,
                         std::optional<Tensor> noise, int64_t streams, int64_t seed, int64_t offset) {
  const NoiseForward args = noise_forward_args(x, signal_scale, noise_scale, out, noise, streams, seed, offset);
  if (args.space.length == 0) return;
  prefer_huge_pages(out);
  if (noise) prefer_huge_pages(*noise);
  const Kernels& kernels = cpu_kernels();
  const bool fp64 = in_fp64(x);
  torch::stable::parallel_for(0, args.space.jobs(), kGrain / streams + 1, [&](int64_t begin, int64_t end) {
    kernels.noise_forward(args, fp64, begin, end);
  });
}

void token_noise_bwd_cpu(const Tensor& grad_out, const Tensor& x, const Tensor& signal_scale,
                         std::optional<Tensor> grad_x, std::optional<Tensor> sum_signal,
                         std::optional<Tensor> sum_noise, int64_t streams, int64_t seed, int64_t offset) {
  Frames frames(x, streams, seed, offset);
  NoiseBackward args;
  args.grad_out = frames.sequence("grad_out", grad_out, false);
  args.x = frames.data("x", x);
  args.signal = frames.sequence("signal_scale", signal_scale, true);
  const bool fp64 = in_fp64(x);
  const Kernels& kernels = cpu_kernels();
  if (grad_x) {
    Frames space(frames);
    NoiseBackward task = args;
    task.grad_x = noise_grad_x(frames, *grad_x, x);
    space.merge({&task.grad_out, &task.signal});
    task.space = space.space;
    if (task.space.length > 0)
      torch::stable::parallel_for(0, task.space.jobs(), kGrain / streams + 1, [&](int64_t begin, int64_t end) {
        kernels.noise_grad_x(task, fp64, begin, end);
      });
  }
  if (!sum_signal && !sum_noise) return;
  // Sums are (slabs, ...) in fp64, zero at first; one slab is one sequence of additions.
  args.slabs = sum_signal ? sum_signal->size(0) : sum_noise->size(0);
  for (const auto& [name, sum, operand, size] :
       {std::tuple{"sum_signal", &sum_signal, &args.grad_signal, &args.slab_signal},
        std::tuple{"sum_noise", &sum_noise, &args.grad_noise, &args.slab_noise}}) {
    if (!*sum) continue;
    *operand = noise_sum(frames, name, **sum, x);
    STD_TORCH_CHECK((*sum)->size(0) == args.slabs, name, ": must have the slabs of sum_signal = ", args.slabs,
                    ", got ", (*sum)->size(0));
    *size = (*sum)->numel() / args.slabs;
  }
  frames.merge({&args.grad_out, &args.x, &args.grad_signal, &args.grad_noise});
  args.space = frames.space;
  if (args.space.length == 0) return;
  torch::stable::parallel_for(0, args.slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slab = begin; slab < end; ++slab) kernels.noise_backward(args, fp64, slab);
  });
}

void token_noise_eps_cpu(Tensor out, int64_t seed, int64_t offset) {
  check_contiguous("out", out);
  const Type type = type_of("out", out);
  const int64_t count = out.numel();
  prefer_huge_pages(out);
  const Kernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, (count + kChunk - 1) / kChunk, kGrain, [&](int64_t begin, int64_t end) {
    kernels.eps(out.data_ptr(), type, count, static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), begin, end);
  });
}

}  // namespace sae
