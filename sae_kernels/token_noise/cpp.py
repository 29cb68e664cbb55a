"""token_noise by the C++ extension (csrc/token_noise.cpp and .cu): one pass over the data, on the CPU and on CUDA."""

from __future__ import annotations

import torch

# At most this many partial sums of a scale's gradient: each takes as much memory as the scale; added in order.
SLABS = 16


def eps(out: torch.Tensor, seed: int, offset: int) -> None:
    """Fill a contiguous tensor with standard normals."""
    torch.ops.sae_kernels_native.token_noise_eps(out, seed, offset)


def forward(
    x: torch.Tensor,
    signal_scale: torch.Tensor,
    noise_scale: torch.Tensor,
    out: torch.Tensor,
    noise: torch.Tensor | None,
    streams: int,
    seed: int,
    offset: int,
) -> None:
    """Write signal_scale x + noise_scale eps to `out` (B, F, ...), and eps to `noise` if given; both contiguous."""
    torch.ops.sae_kernels_native.token_noise_fwd(x, signal_scale, noise_scale, out, noise, streams, seed, offset)


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    signal_scale: torch.Tensor,
    grad_x: torch.Tensor | None,
    grad_signal: torch.Tensor | None,
    grad_noise: torch.Tensor | None,
    seed: int,
    offset: int,
) -> None:
    """Write the gradients that are not None. eps is generated again, not stored."""
    wanted = [grad for grad in (grad_signal, grad_noise) if grad is not None]
    largest = max((grad.numel() for grad in wanted), default=1)
    # On CUDA one block sums one element of a gradient; on the CPU each thread fills a slab.
    slabs = 1 if x.is_cuda else max(1, min(SLABS, grad_out.numel() // largest))
    sum_signal, sum_noise = (
        None if grad is None else torch.zeros((slabs, *grad.shape), dtype=torch.float64, device=grad.device)
        for grad in (grad_signal, grad_noise)
    )
    torch.ops.sae_kernels_native.token_noise_bwd(
        grad_out, x, signal_scale, grad_x, sum_signal, sum_noise, grad_out.shape[1] // x.shape[1], seed, offset
    )
    for grad, total in ((grad_signal, sum_signal), (grad_noise, sum_noise)):
        if grad is not None and total is not None:
            grad.copy_(total.sum(0))
