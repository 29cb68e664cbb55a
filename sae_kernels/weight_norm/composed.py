"""Weight normalisation in few passes, forward and backward, on any device; outputs are allocated by ops.py.

Everything is computed in fp32 (fp64 for fp64) and rounded once.
"""

from __future__ import annotations

import math

import torch

from .._tensors import compute_dtype, store, up, workspace


def normalize_weight(
    w: torch.Tensor, gain: torch.Tensor | None, factor: float, out: torch.Tensor, rms: torch.Tensor
) -> None:
    fan_in = math.prod(w.shape[1:])
    torch.linalg.vector_norm(w, dim=list(range(1, w.ndim)), keepdim=True, dtype=rms.dtype, out=rms).mul_(fan_in**-0.5)
    work = workspace(out)
    torch.mul(up(w), _scale(gain, factor, fan_in, rms) / (rms + 1e-4), out=work)
    store(work, out)


def normalize_weight_backward(
    grad_out: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None,
    factor: float,
    rms: torch.Tensor,
    grad_w: torch.Tensor | None,
    grad_gain: torch.Tensor | None,
) -> None:
    """With c = gain / sqrt(n), d = rms + eps and <,> over an output channel of n elements:

    grad_w = c / d (grad - w <grad, w> / (d n rms)), grad_gain = sum <grad, w> / (d sqrt(n)).
    """
    fan_in, dims = math.prod(w.shape[1:]), list(range(1, w.ndim))
    grad, w32, d = up(grad_out), up(w), rms + 1e-4
    product = grad * w32
    dot = product.sum(dims, keepdim=True) / d
    if grad_gain is not None:
        grad_gain.copy_(dot.sum() * (factor * fan_in**-0.5))
    if grad_w is not None:
        over_d = _scale(gain, factor, fan_in, rms) / d
        slope = (dot * over_d / (-fan_in * rms)).masked_fill_(rms == 0, 0)
        work = workspace(grad_w)
        torch.mul(w32, slope, out=work).addcmul_(grad, over_d)
        store(work, grad_w)


def _scale(gain: torch.Tensor | None, factor: float, fan_in: int, rms: torch.Tensor) -> float | torch.Tensor:
    scale = factor * fan_in**-0.5
    return scale if gain is None else gain.to(rms.dtype) * scale


@torch.no_grad()
def normalize_weights_(weights: list[torch.Tensor], copies: list[torch.Tensor], gains: list[float]) -> None:
    """Each weight to unit RMS for each output channel, in place; copies get the weight that forward would use."""
    for w in weights:
        normalize_weight(w, None, math.prod(w.shape[1:]) ** 0.5, w, _rms_of(w))
    for w, copy, gain in zip(weights, copies, gains, strict=False):
        made = torch.empty_like(w, dtype=compute_dtype(w.dtype))
        normalize_weight(w, None, gain, made, _rms_of(w))
        copy.copy_(made)


def normalize_weights(weights: list[torch.Tensor], outs: list[torch.Tensor], gains: list[float]) -> None:
    for w, out, gain in zip(weights, outs, gains, strict=True):
        made = torch.empty_like(w, dtype=compute_dtype(w.dtype))
        normalize_weight(w, None, gain, made, _rms_of(w))
        out.copy_(made)


def normalize_weights_backward(
    grads: list[torch.Tensor], weights: list[torch.Tensor], grad_weights: list[torch.Tensor], gains: list[float]
) -> None:
    for grad, w, grad_w, gain in zip(grads, weights, grad_weights, gains, strict=True):
        rms = _rms_of(w)
        torch.linalg.vector_norm(w, dim=list(range(1, w.ndim)), keepdim=True, dtype=rms.dtype, out=rms)
        rms.mul_(math.prod(w.shape[1:]) ** -0.5)
        normalize_weight_backward(grad, w, None, gain, rms, grad_w, None)


def _rms_of(w: torch.Tensor) -> torch.Tensor:
    """An empty tensor for the RMS of each output channel."""
    return torch.empty((len(w), *[1] * (w.ndim - 1)), dtype=compute_dtype(w.dtype), device=w.device)
