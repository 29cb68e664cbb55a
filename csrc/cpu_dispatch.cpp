// Picks the inner loops for this processor once.
#include <cstdlib>
#include <cstring>

#include "cpu_kernels.h"

namespace sae {

namespace baseline {
extern const Kernels kernels;
}
#ifdef SAE_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

const Kernels& choose() {
#ifdef SAE_X86
  const char* asked = std::getenv("SAE_CPU_CAPABILITY");
  const bool baseline_only = asked && std::strcmp(asked, "baseline") == 0;
  const bool avx2_only = asked && std::strcmp(asked, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2_runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512_runs = avx2_runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512_runs && !baseline_only && !avx2_only) return avx512::kernels;
  if (avx2_runs && !baseline_only) return avx2::kernels;
#endif
  return baseline::kernels;
}

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace sae
