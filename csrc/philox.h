// The one random number generator: Philox4x32-10 on (element group, offset), key = seed, then Box-Muller.
//
// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Host and device; no branches, so loops over groups
// vectorise.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SAE_INLINE __host__ __device__ __forceinline__
#else
#define SAE_INLINE inline __attribute__((always_inline))
#endif

namespace sae {

struct Words {
  uint32_t w0, w1, w2, w3;
};

// The four words of group `group` = element / 4.
SAE_INLINE Words philox(uint64_t group, uint64_t offset, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

}  // namespace sae
