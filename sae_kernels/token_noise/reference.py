"""The specification of token_noise: Philox4x32-10, Box-Muller, two scales. Any float dtype, differentiable by autograd.

B batch, T clean frames, R = 1 + K streams, F = R T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: Sequence[torch.Tensor], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Four words of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") for each counter.

    Words are int64 tensors in [0, 2^32). A product of two of them wraps to the right 64 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


def token_noise_eps(
    shape: Sequence[int], seed: int, offset: int, device: torch.device | str | None, dtype: torch.dtype
) -> torch.Tensor:
    """Standard normals: element e of the contiguous result is number e % 4 of counter (e // 4, offset), key seed."""
    elements = math.prod(shape)
    group = torch.arange(-(-elements // 4), dtype=torch.int64, device=device)
    offset_lo, offset_hi = torch.full_like(group, offset & WORD), torch.full_like(group, offset >> 32 & WORD)
    words = philox((group & WORD, group >> 32, offset_lo, offset_hi), (seed & WORD, seed >> 32 & WORD))
    u0, u1, u2, u3 = ((w.to(torch.float32) + 0.5) * 2.0**-32 for w in words)
    r0, r2 = (-2 * u0.log()).sqrt(), (-2 * u2.log()).sqrt()
    a1, a3 = 2 * math.pi * u1, 2 * math.pi * u3
    normals = torch.stack((r0 * a1.cos(), r0 * a1.sin(), r2 * a3.cos(), r2 * a3.sin()), dim=1)
    return normals.flatten()[:elements].view(tuple(shape)).to(dtype)


def token_noise(
    x: torch.Tensor,
    signal_scale: torch.Tensor,
    noise_scale: torch.Tensor,
    streams: int,
    seed: int,
    offset: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(signal_scale x + noise_scale eps, eps) of shape (B, F, ...); the scales have the rank of x."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    data = torch.cat([x.to(compute)] * streams, dim=1)
    eps = token_noise_eps(data.shape, seed, offset, x.device, compute)
    out = signal_scale.to(compute) * data + noise_scale.to(compute) * eps
    return out.to(dtype), eps.to(dtype)
