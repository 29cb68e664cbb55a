"""The magnitude-preserving functions by the C++ extension on the CPU (csrc/steps.cpp), one pass over memory each way.

Outputs are given by ops.py. The kernels walk dense tensors of one order of memory, those of the outputs; inputs of
another order are copied. What has channels takes contiguous and channels-last memory; other orders are copied.
"""

from __future__ import annotations

import math

import torch

from .._tensors import ordered_as


def mp_silu(x: torch.Tensor, out: torch.Tensor) -> None:
    torch.ops.sae_kernels_native.mp_silu(ordered_as(x, out), None, out)


def mp_silu_backward(grad_out: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor) -> None:
    torch.ops.sae_kernels_native.mp_silu(ordered_as(x, grad_x), ordered_as(grad_out, grad_x), grad_x)


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float, limit: float | None, out: torch.Tensor) -> None:
    norm = math.hypot(1 - t, t)
    a, b = ordered_as(a, out), ordered_as(b, out)
    torch.ops.sae_kernels_native.mp_sum(a, b, out, (1 - t) / norm, t / norm, limit)


def mp_sum_backward(
    grad_out: torch.Tensor,
    out: torch.Tensor | None,
    t: float,
    limit: float | None,
    grad_a: torch.Tensor | None,
    grad_b: torch.Tensor | None,
) -> None:
    """Writes those gradients that are not None; nothing passes where `out` reached the limit."""
    norm, grad = math.hypot(1 - t, t), grad_a if grad_a is not None else grad_b
    if grad is None:
        return
    grad_out, out = ordered_as(grad_out, grad), None if out is None else ordered_as(out, grad)
    torch.ops.sae_kernels_native.mp_sum_bwd(grad_out, out, grad_a, grad_b, (1 - t) / norm, t / norm, limit)


def mp_cat(a: torch.Tensor, b: torch.Tensor, dim: int, weight_a: float, weight_b: float, out: torch.Tensor) -> None:
    channels_last = not out.is_contiguous()
    parts, rows = [_ordered(x, channels_last) for x in (a, b)], _rows(out, dim, channels_last)
    torch.ops.sae_kernels_native.mp_cat(parts, out, [weight_a, weight_b], rows, False)


def mp_cat_backward(
    grad_out: torch.Tensor, dim: int, weight_a: float, weight_b: float, grad_a: torch.Tensor, grad_b: torch.Tensor
) -> None:
    channels_last = not (grad_a.is_contiguous() and grad_b.is_contiguous())
    whole, rows = _ordered(grad_out, channels_last), _rows(grad_out, dim, channels_last)
    torch.ops.sae_kernels_native.mp_cat([grad_a, grad_b], whole, [weight_a, weight_b], rows, True)


def modulated_silu(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    channels_last = _is_channels_last(out)
    room, scale = _room(out, channels_last), _by_group(scale, channels_last)
    channels = x.shape[1] if channels_last else 1
    torch.ops.sae_kernels_native.modulated_silu(_ordered(x, channels_last), scale, room, channels)
    _store(room, out)


def modulated_silu_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    grad_x: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
) -> None:
    """Writes those gradients that are not None."""
    channels_last = _is_channels_last(x if grad_x is None else grad_x)
    grad_out, x = _ordered(grad_out, channels_last), _ordered(x, channels_last)
    room = None if grad_x is None else _room(grad_x, channels_last)
    factor = _by_group(scale, channels_last)
    total = None if grad_scale is None else torch.zeros_like(factor) if x.numel() == 0 else torch.empty_like(factor)
    channels = x.shape[1] if channels_last else 1
    torch.ops.sae_kernels_native.modulated_silu_bwd(grad_out, x, factor, room, total, channels)
    if grad_x is not None and room is not None:
        _store(room, grad_x)
    if grad_scale is not None and total is not None:
        grad_scale.copy_(total if channels_last else total.transpose(1, 2))


def pixel_norm(
    x: torch.Tensor, dim: int, eps: float, out: torch.Tensor, rms: torch.Tensor, act: torch.Tensor | None = None
) -> None:
    """Also writes mp_silu of the result to `act` if given."""
    channels_last = dim == 1 and _is_channels_last(out)
    inner = 1 if channels_last else math.prod(x.shape[dim + 1 :])
    if x.numel() == 0:
        return
    room, act_room = _room(out, channels_last), None if act is None else _room(act, channels_last)
    x = _ordered(x, channels_last)
    torch.ops.sae_kernels_native.pixel_norm(x, room, rms, act_room, x.shape[dim], inner, eps)
    _store(room, out)
    if act is not None and act_room is not None:
        _store(act_room, act)


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
    channels_last = dim == 1 and _is_channels_last(grad_x)
    inner = 1 if channels_last else math.prod(out.shape[dim + 1 :])
    if out.numel() == 0:
        return
    room, rms = _room(grad_x, channels_last), rms.contiguous()
    grad_out, out = _ordered(grad_out, channels_last), _ordered(out, channels_last)
    grad_act = None if grad_act is None else _ordered(grad_act, channels_last)
    torch.ops.sae_kernels_native.pixel_norm_bwd(grad_out, grad_act, out, rms, room, out.shape[dim], inner, eps)
    _store(room, grad_x)


def _is_channels_last(x: torch.Tensor) -> bool:
    """Whether (B, C, ...) lies in memory as (B, ..., C), and not as (B, C, ...) too."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _ordered(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _room(out: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """`out`, or room beside it for results of the order that the kernels take."""
    return out if channels_last or out.is_contiguous() else out.new_empty(out.shape)


def _store(room: torch.Tensor, out: torch.Tensor) -> None:
    if room is not out:
        out.copy_(room)


def _rows(whole: torch.Tensor, dim: int, channels_last: bool) -> int:
    """Steps along what lies before `dim` in memory."""
    shape = (whole.shape[0], *whole.shape[2:], whole.shape[1]) if channels_last else whole.shape
    place = dim if not channels_last or dim == 0 else whole.ndim - 1 if dim == 1 else dim - 1
    return math.prod(shape[:place])


def _by_group(scale: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """scale (B, F, C) in fp32, contiguous as (B, F, C), or (B, C, F) where channels lie before frames."""
    return (scale if channels_last else scale.transpose(1, 2)).to(torch.float32).contiguous()
