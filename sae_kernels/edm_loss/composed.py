"""edm_loss from tensor operations, on any device.

With preconditioning and weight multiplied out, the weighted error is raw - (sigma x0 / d - d eps) / sqrt(sigma^2 +
d^2): no difference of nearly equal numbers is left, and no weight that overflows at small sigma. At sigma = 0, where
the weight is infinite and what it weighs 0, the result is NaN as the reference's.
"""

from __future__ import annotations

import math

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def error(
    raw: torch.Tensor,
    x0: torch.Tensor,
    sigma: torch.Tensor,
    streams: int,
    noisy_first: bool,
    sigma_data: float,
    seed: int,
    offset: int,
) -> torch.Tensor:
    """(B, K, T, ...) in the compute dtype."""
    compute, frames = compute_dtype(raw.dtype), x0.shape[1]
    shape = (raw.shape[0], streams * frames, *raw.shape[2:])
    eps = torch.ops.sae_kernels.token_noise_eps(raw.new_empty(0, dtype=torch.float32), shape, seed, offset, "composed")
    eps = eps.narrow(1, 0 if noisy_first else frames, raw.shape[1]).unflatten(1, (-1, frames)).to(compute)
    s = sigma.double().unflatten(1, (-1, frames))
    s = s.view(s.shape + (1,) * (x0.ndim - 2))
    s = s.masked_fill(s == 0, math.nan)
    total = torch.hypot(s, torch.full_like(s, sigma_data))
    result = raw.unflatten(1, (-1, frames)).to(compute, copy=True)
    result.addcmul_(x0.unsqueeze(1).to(compute), (s / total / sigma_data).to(compute), value=-1)
    return result.addcmul_(eps, (sigma_data / total).to(compute))


def forward(raw, x0, sigma, out, streams, noisy_first, sigma_data, seed, offset) -> None:
    """Write the loss of each noisy frame to `out` (B, K T)."""
    e = error(raw, x0, sigma, streams, noisy_first, sigma_data, seed, offset)
    out.copy_(e.square_().flatten(3).mean(dim=3).flatten(1))


def backward(grad_loss, raw, x0, sigma, grad_raw, streams, noisy_first, sigma_data, seed, offset) -> None:
    """Write 2 / n times the error, times the gradient of its frame's loss."""
    e = error(raw, x0, sigma, streams, noisy_first, sigma_data, seed, offset).flatten(1, 2)
    n = e[0, 0].numel()
    scale = (grad_loss.to(e.dtype) * (2 / n)).view(grad_loss.shape + (1,) * (raw.ndim - 2))
    grad_raw.copy_(e.mul_(scale))
