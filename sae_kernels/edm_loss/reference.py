"""The specification of edm_loss (Karras et al. 2022, "Elucidating the design space ...", table 1), differentiable.

B batch, T clean frames, K noisy copies.
"""

from __future__ import annotations

import torch


def edm_loss(
    raw: torch.Tensor, x0: torch.Tensor, sigma: torch.Tensor, eps: torch.Tensor, sigma_data: float
) -> torch.Tensor:
    """(B, K T): loss_weight times the mean squared error of D. raw and eps are (B, K T, ...), x0 (B, T, ...)."""
    compute = torch.float64 if raw.dtype == torch.float64 else torch.float32
    raw, x0, eps = raw.to(compute), torch.cat([x0.to(compute)] * (raw.shape[1] // x0.shape[1]), dim=1), eps.to(compute)
    s, d = sigma.to(compute).view(sigma.shape + (1,) * (raw.ndim - 2)), sigma_data
    total = s**2 + d**2
    denoised = d**2 / total * (x0 + s * eps) + s * d / total.sqrt() * raw
    weight = total / (s * d) ** 2
    return (weight * (denoised - x0) ** 2).flatten(2).mean(dim=2)
