"""The specification of edm_loss (Karras et al. 2022, "Elucidating the design space ...", table 1), differentiable.

B batch, T clean frames, K noisy copies.
"""

from __future__ import annotations

import torch


def edm_loss(
    model_output: torch.Tensor, x0: torch.Tensor, sigma: torch.Tensor, eps: torch.Tensor, sigma_data: float
) -> torch.Tensor:
    """(B, K T): loss_weight times the mean squared error of D; model_output and eps (B, K T, ...), x0 (B, T, ...)."""
    compute, copies = torch.promote_types(model_output.dtype, torch.float32), model_output.shape[1] // x0.shape[1]
    output, x0, eps = model_output.to(compute), torch.cat([x0.to(compute)] * copies, dim=1), eps.to(compute)
    s, d = sigma.to(compute).view(sigma.shape + (1,) * (output.ndim - 2)), sigma_data
    total = s**2 + d**2
    denoised = d**2 / total * (x0 + s * eps) + s * d / total.sqrt() * output
    weight = total / (s * d) ** 2
    return (weight * (denoised - x0) ** 2).flatten(2).mean(dim=2)
