"""edm_loss by the C++ extension (csrc/edm_loss.cpp and .cu): one pass over model_output and x0."""

from __future__ import annotations

import torch


def forward(model_output, x0, sigma, out, streams, noisy_first, sigma_data, seed, offset) -> None:
    """Write the loss of each noisy frame to `out` (B, K T)."""
    first = 0 if noisy_first else 1
    sigma = sigma.to(torch.float64).contiguous()
    torch.ops.sae_kernels_native.edm_loss(model_output, x0, sigma, out, None, streams, first, sigma_data, seed, offset)


def backward(grad_loss, model_output, x0, sigma, grad_output, streams, noisy_first, sigma_data, seed, offset) -> None:
    """Write 2 / n times the error, times the gradient of its frame's loss."""
    first = 0 if noisy_first else 1
    sigma, grad_loss = sigma.to(torch.float64).contiguous(), grad_loss.contiguous()
    torch.ops.sae_kernels_native.edm_loss(
        model_output, x0, sigma, grad_output, grad_loss, streams, first, sigma_data, seed, offset
    )
