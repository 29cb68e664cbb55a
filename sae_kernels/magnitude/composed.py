"""The magnitude-preserving functions in few passes, forward and backward, on any device; outputs are given by ops.py.

Everything is computed in fp32 (fp64 for fp64) inside each library call. mp_silu, mp_cat and mp_sum with a number round
their low-precision result twice, as eager PyTorch does; the others round once.
"""

from __future__ import annotations

import math

import torch

SILU_GAIN = 1 / 0.596


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _up(x: torch.Tensor) -> torch.Tensor:
    # CPU kernels for mixed dtypes are ten times slower than a cast.
    return x.to(compute_dtype(x.dtype))


def _work(out: torch.Tensor) -> torch.Tensor:
    """`out` itself where it can hold the intermediate, else an fp32 one beside it."""
    dtype = compute_dtype(out.dtype)
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def _store(work: torch.Tensor, out: torch.Tensor) -> None:
    if work is not out:
        out.copy_(work)


def mp_silu(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.ops.aten.silu.out(x, out=out).mul_(SILU_GAIN)


def mp_silu_backward(grad_out: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(grad_out, x, grad_input=grad_x).mul_(SILU_GAIN)


def scaled_copy(x: torch.Tensor, factor: float, out: torch.Tensor) -> None:
    torch.mul(x, factor, out=out)


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float, out: torch.Tensor) -> None:
    torch.lerp(a, b, t, out=out).mul_(1 / math.hypot(1 - t, t))


def mp_sum_tensor(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
    t, work = t.to(compute_dtype(a.dtype)), _work(out)
    norm = torch.hypot(1 - t, t)
    torch.mul(_up(a), (1 - t) / norm, out=work).addcmul_(_up(b), t / norm)
    _store(work, out)


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
    norm, grad = torch.hypot(1 - t, t), _up(grad_out)
    for target, weight in ((grad_a, (1 - t) / norm), (grad_b, t / norm)):
        if target is not None:
            work = _work(target)
            torch.mul(grad, weight, out=work)
            _store(work, target)
    if grad_t is not None:
        slope = torch.mul(_up(b), 1 - t).addcmul_(_up(a), t, value=-1).mul_(grad)
        grad_t.copy_(slope.sum_to_size(t.shape) / norm**3)


def pixel_norm(x: torch.Tensor, dim: int, eps: float, out: torch.Tensor, rms: torch.Tensor) -> None:
    torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=rms.dtype, out=rms).mul_(x.shape[dim] ** -0.5)
    work = _work(out)
    torch.div(_up(x), rms + eps, out=work)
    _store(work, out)


def pixel_norm_backward(
    grad_out: torch.Tensor, out: torch.Tensor, rms: torch.Tensor, dim: int, eps: float, grad_x: torch.Tensor
) -> None:
    """grad_x = grad / (rms + eps) - out <grad, out> / (n rms), from the output, so that the input need not be kept."""
    grad, out, work = _up(grad_out), _up(out), _work(grad_x)
    torch.mul(grad, out, out=work)
    # The norm has gradient zero at the origin, by autograd's convention.
    slope = (work.sum(dim, keepdim=True) / (-out.shape[dim] * rms)).masked_fill_(rms == 0, 0)
    torch.mul(out, slope, out=work).addcmul_(grad, 1 / (rms + eps))
    _store(work, grad_x)


def normalize_weight(
    w: torch.Tensor, gain: torch.Tensor | None, factor: float, out: torch.Tensor, rms: torch.Tensor
) -> None:
    fan_in = math.prod(w.shape[1:])
    torch.linalg.vector_norm(w, dim=list(range(1, w.ndim)), keepdim=True, dtype=rms.dtype, out=rms).mul_(fan_in**-0.5)
    work = _work(out)
    torch.mul(_up(w), _scale(gain, factor, fan_in, rms) / (rms + 1e-4), out=work)
    _store(work, out)


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
    grad, w32, d = _up(grad_out), _up(w), rms + 1e-4
    product = grad * w32
    dot = product.sum(dims, keepdim=True) / d
    if grad_gain is not None:
        grad_gain.copy_(dot.sum() * (factor * fan_in**-0.5))
    if grad_w is not None:
        over_d = _scale(gain, factor, fan_in, rms) / d
        slope = (dot * over_d / (-fan_in * rms)).masked_fill_(rms == 0, 0)
        work = _work(grad_w)
        torch.mul(w32, slope, out=work).addcmul_(grad, over_d)
        _store(work, grad_w)


def _scale(gain: torch.Tensor | None, factor: float, fan_in: int, rms: torch.Tensor) -> float | torch.Tensor:
    scale = factor * fan_in**-0.5
    return scale if gain is None else gain.to(rms.dtype) * scale


@torch.no_grad()
def normalize_weights(weights: list[torch.Tensor], copies: list[torch.Tensor], gains: list[float]) -> None:
    """Each weight to unit RMS for each output channel, in place; copies get the weight that forward would use."""
    for w in weights:
        rms = torch.empty((len(w), *[1] * (w.ndim - 1)), dtype=compute_dtype(w.dtype), device=w.device)
        normalize_weight(w, None, math.prod(w.shape[1:]) ** 0.5, w, rms)
    for w, copy, gain in zip(weights, copies, gains, strict=False):
        out = torch.empty_like(w, memory_format=torch.contiguous_format)
        normalize_weight(w, None, gain, out, w.new_empty((len(w), *[1] * (w.ndim - 1)), dtype=compute_dtype(w.dtype)))
        copy.copy_(out)
