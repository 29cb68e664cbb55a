"""The magnitude-preserving functions in few passes, forward and backward, on any device; outputs are given by ops.py.

Everything is computed in fp32 (fp64 for fp64) inside each library call. mp_silu, mp_cat and mp_sum with a number round
their low-precision result twice, as eager PyTorch does; the others round once.
"""

from __future__ import annotations

import math

import torch

from .._tensors import compute_dtype, store, up, workspace

SILU_GAIN = 1 / 0.596


def mp_silu(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.ops.aten.silu.out(x, out=out).mul_(SILU_GAIN)


def mp_silu_backward(grad_out: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(grad_out, x, grad_input=grad_x).mul_(SILU_GAIN)


def modulated_silu(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    work = workspace(out)
    torch.mul(up(x), _per_channel(scale, x), out=work)
    torch.ops.aten.silu.out(work, out=work).mul_(SILU_GAIN)
    store(work, out)


def modulated_silu_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    grad_x: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
) -> None:
    """Writes those gradients that are not None."""
    x, scale = up(x), _per_channel(scale, x)
    z = x * scale
    grad = torch.ops.aten.silu_backward.grad_input(up(grad_out), z, grad_input=z)
    if grad_x is not None:
        work = workspace(grad_x)
        torch.mul(grad, scale * SILU_GAIN, out=work)
        store(work, grad_x)
    if grad_scale is not None:
        total = grad.mul_(x).sum_to_size(scale.shape).mul_(SILU_GAIN)
        grad_scale.copy_(total.reshape(total.shape[:3]).transpose(1, 2))


def _per_channel(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, F, C) -> (B, C, F, 1, ...), in the compute dtype."""
    scale = scale.to(compute_dtype(x.dtype)).transpose(1, 2)
    return scale.reshape(scale.shape + (1,) * (x.ndim - 3))


def mp_cat(a: torch.Tensor, b: torch.Tensor, dim: int, weight_a: float, weight_b: float, out: torch.Tensor) -> None:
    torch.mul(a, weight_a, out=out.narrow(dim, 0, a.shape[dim]))
    torch.mul(b, weight_b, out=out.narrow(dim, a.shape[dim], b.shape[dim]))


def mp_cat_backward(
    grad_out: torch.Tensor, dim: int, weight_a: float, weight_b: float, grad_a: torch.Tensor, grad_b: torch.Tensor
) -> None:
    torch.mul(grad_out.narrow(dim, 0, grad_a.shape[dim]), weight_a, out=grad_a)
    torch.mul(grad_out.narrow(dim, grad_a.shape[dim], grad_b.shape[dim]), weight_b, out=grad_b)


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float, limit: float | None, out: torch.Tensor) -> None:
    # Not lerp: it makes NaN of an infinity.
    norm = math.hypot(1 - t, t)
    torch.mul(a, (1 - t) / norm, out=out).add_(b, alpha=t / norm)
    if limit is not None:
        out.clamp_(-limit, limit)


def mp_sum_backward(
    grad_out: torch.Tensor,
    out: torch.Tensor | None,
    t: float,
    limit: float | None,
    grad_a: torch.Tensor | None,
    grad_b: torch.Tensor | None,
) -> None:
    """Writes those gradients that are not None; nothing passes where `out` reached the limit."""
    norm = math.hypot(1 - t, t)
    targets = [(g, w) for g, w in ((grad_a, (1 - t) / norm), (grad_b, t / norm)) if g is not None]
    if limit is not None and targets:
        last = targets[-1][0]
        grad_out = torch.ops.aten.hardtanh_backward.grad_input(grad_out, out, -limit, limit, grad_input=last)
    for target, weight in targets:
        torch.mul(grad_out, weight, out=target)


def mp_sum_tensor(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
    t, work = t.to(compute_dtype(a.dtype)), workspace(out)
    norm = torch.hypot(1 - t, t)
    torch.mul(up(a), (1 - t) / norm, out=work).addcmul_(up(b), t / norm)
    store(work, out)


def mp_sum_tensor_backward(
    grad_out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    t: torch.Tensor,
    grad_a: torch.Tensor | None,
    grad_b: torch.Tensor | None,
    grad_t: torch.Tensor | None,
) -> None:
    """Writes those gradients that are not None. d/dt of the sum is ((1 - t) b - t a) / ((1 - t)^2 + t^2)^(3/2)."""
    t = t.to(compute_dtype(a.dtype))
    norm, grad = torch.hypot(1 - t, t), up(grad_out)
    for target, weight in ((grad_a, (1 - t) / norm), (grad_b, t / norm)):
        if target is not None:
            work = workspace(target)
            torch.mul(grad, weight, out=work)
            store(work, target)
    if grad_t is not None:
        slope = torch.mul(up(b), 1 - t).addcmul_(up(a), t, value=-1).mul_(grad)
        grad_t.copy_(slope.sum_to_size(t.shape) / norm**3)


def pixel_norm(
    x: torch.Tensor, dim: int, eps: float, out: torch.Tensor, rms: torch.Tensor, act: torch.Tensor | None = None
) -> None:
    """Also writes mp_silu of the result to `act` if given."""
    torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=rms.dtype, out=rms).mul_(x.shape[dim] ** -0.5)
    work = workspace(out)
    torch.div(up(x), rms + eps, out=work)
    store(work, out)
    if act is not None:
        mp_silu(out, act)


def pixel_norm_backward(
    grad_out: torch.Tensor,
    out: torch.Tensor,
    rms: torch.Tensor,
    dim: int,
    eps: float,
    grad_x: torch.Tensor,
    grad_act: torch.Tensor | None = None,
) -> None:
    """grad_x = grad / (rms + eps) - out <grad, out> / (n rms), from the output, so that the input need not be kept.

    grad is grad_out, and where mp_silu of the output was taken too, the gradient through that.
    """
    grad, out, work = up(grad_out), up(out), workspace(grad_x)
    if grad_act is not None:
        grad = torch.ops.aten.silu_backward(up(grad_act), out).mul_(SILU_GAIN).add_(grad)
    torch.mul(grad, out, out=work)
    # The norm has gradient zero at the origin, by autograd's convention.
    slope = (work.sum(dim, keepdim=True) / (-out.shape[dim] * rms)).masked_fill_(rms == 0, 0)
    torch.mul(out, slope, out=work).addcmul_(grad, 1 / (rms + eps))
    store(work, grad_x)
