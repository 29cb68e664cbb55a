"""The specification of the magnitude-preserving functions; equation numbers of EDM2 (Karras et al. 2024).

Any float dtype, differentiable by autograd.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .._tensors import compute_dtype


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """Eq. 81. 0.596 is the RMS of silu(n) for n ~ N(0, 1)."""
    return F.silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float | torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """Eq. 88; hardtanh passes no gradient where the limit is reached."""
    if isinstance(t, torch.Tensor):
        t = t.to(compute_dtype(a.dtype))
    total = (((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5).to(a.dtype)
    return total if limit is None else F.hardtanh(total, -limit, limit)


def modulated_silu(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """mp_silu of x (B, C, F, ...) times scale (B, F, C)."""
    scale = scale.transpose(1, 2).reshape(scale.shape[0], scale.shape[2], scale.shape[1], *[1] * (x.ndim - 3))
    return mp_silu((x * scale).to(x.dtype))


def mp_cat(a: torch.Tensor, b: torch.Tensor, dim: int, t: float) -> torch.Tensor:
    """Eq. 103."""
    n_a, n_b = a.shape[dim], b.shape[dim]
    c = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([c * (1 - t) / math.sqrt(n_a) * a, c * t / math.sqrt(n_b) * b], dim=dim)


def pixel_norm(x: torch.Tensor, dim: int, eps: float) -> torch.Tensor:
    """x / (eps + root mean square of x along dim)."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=compute_dtype(x.dtype))
    return (x / (eps + norm / math.sqrt(x.shape[dim]))).to(x.dtype)


def pixel_norm_silu(x: torch.Tensor, dim: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    normed = pixel_norm(x, dim, eps)
    return normed, mp_silu(normed)
