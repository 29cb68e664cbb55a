"""edm_loss from tensor operations, on any device.

With preconditioning and weight multiplied out, the weighted error is model_output - (sigma x0 / d - d eps) /
sqrt(sigma^2 + d^2): it has no difference of nearly equal numbers, and no weight that overflows at small sigma. At
sigma = 0, where the weight is infinite and its factor 0, the result is NaN, as in the reference.
"""

from __future__ import annotations

import math

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def error(
    model_output: torch.Tensor,
    x0: torch.Tensor,
    sigma: torch.Tensor,
    streams: int,
    noisy_first: bool,
    sigma_data: float,
    seed: int,
    offset: int,
) -> torch.Tensor:
    """(B, K, T, ...) in the compute dtype."""
    compute, frames = compute_dtype(model_output.dtype), x0.shape[1]
    shape = (model_output.shape[0], streams * frames, *model_output.shape[2:])
    eps = torch.ops.sae_kernels.token_noise_eps(
        model_output.new_empty(0, dtype=torch.float32), shape, seed, offset, "composed"
    )
    eps = eps.narrow(1, 0 if noisy_first else frames, model_output.shape[1]).unflatten(1, (-1, frames)).to(compute)
    s = sigma.double().unflatten(1, (-1, frames))
    s = s.view(s.shape + (1,) * (x0.ndim - 2))
    s = s.masked_fill(s == 0, math.nan)
    total = torch.hypot(s, torch.full_like(s, sigma_data))
    result = model_output.unflatten(1, (-1, frames)).to(compute, copy=True)
    result.addcmul_(x0.unsqueeze(1).to(compute), (s / total / sigma_data).to(compute), value=-1)
    return result.addcmul_(eps, (sigma_data / total).to(compute))


def forward(model_output, x0, sigma, out, streams, noisy_first, sigma_data, seed, offset) -> None:
    """Write the loss of each noisy frame to `out` (B, K T)."""
    e = error(model_output, x0, sigma, streams, noisy_first, sigma_data, seed, offset)
    out.copy_(e.square_().flatten(3).mean(dim=3).flatten(1))


def backward(grad_loss, model_output, x0, sigma, grad_output, streams, noisy_first, sigma_data, seed, offset) -> None:
    """Write 2 / n times the error, times the gradient of its frame's loss."""
    e = error(model_output, x0, sigma, streams, noisy_first, sigma_data, seed, offset).flatten(1, 2)
    n = e[0, 0].numel()
    scale = (grad_loss.to(e.dtype) * (2 / n)).view(grad_loss.shape + (1,) * (model_output.ndim - 2))
    grad_output.copy_(e.mul_(scale))
