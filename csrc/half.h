// bfloat16 and float16 to and from float, to nearest, ties to even; NaN stays NaN. No branches: loops vectorise.
#pragma once

#include "philox.h"

namespace sae {

SAE_INLINE float widen_bf16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }
SAE_INLINE uint16_t narrow_bf16(float x) {
  const uint32_t u = bits(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}
// Multiplying by 2^112 rebiases the exponent, subnormals included.
SAE_INLINE float widen_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  const uint32_t finite = bits(from_bits(rest) * 0x1p112f);
  const uint32_t special = rest | 0x7F800000u;
  return from_bits(sign | (rest >= 0x0F800000u ? special : finite));
}
SAE_INLINE uint16_t narrow_f16(float x) {
  const uint32_t u = bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  // Below 2^-14 an addition of 0.5 leaves the rounded subnormal in the low bits.
  const uint32_t small = bits(from_bits(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? special : finite));
}

}  // namespace sae
