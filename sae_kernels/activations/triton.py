"""The magnitude-preserving functions in Triton: each tensor is read once and written once, both ways.

Rows of a norm too long for a tile are read twice. Everything is computed in fp32 and rounded once.
Tensors are walked in the order of their memory.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .._launch import Launch, run
from .._tensors import common_unit, ordered_as

SILU_GAIN = 1 / 0.596
BLOCK = 4096  # elements of a program: 16 a thread, whole 16-byte accesses in every dtype
WIDEST = 4096  # channels that pixel_norm holds in one tile; more are walked twice


@triton.jit(do_not_specialize=["units"])
def mp_silu_fwd_kernel(x_ptr, out_ptr, units: tl.int64, gain, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < units * UNIT
    x = tl.load(x_ptr + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (x * gain / (1.0 + tl.exp(-x))).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _silu_slope(x):
    s = 1.0 / (1.0 + tl.exp(-x))
    return s * (1.0 + x * (1.0 - s))


@triton.jit(do_not_specialize=["units"])
def mp_silu_bwd_kernel(grad_ptr, x_ptr, out_ptr, units: tl.int64, gain, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < units * UNIT
    x = tl.load(x_ptr + i, mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (grad * _silu_slope(x) * gain).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["units"])
def mp_sum_fwd_kernel(
    a_ptr, b_ptr, out_ptr, units: tl.int64, weight_a, weight_b, limit,
    CLIP: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < units * UNIT
    a = tl.load(a_ptr + i, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + i, mask=ok, other=0.0).to(tl.float32)
    y = a * weight_a + b * weight_b
    if CLIP:  # comparisons leave NaN as it is
        y = tl.where(y > limit, limit, tl.where(y < -limit, -limit, y))
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["units"])
def mp_sum_bwd_kernel(
    grad_ptr, y_ptr, grad_a_ptr, grad_b_ptr, units: tl.int64, weight_a, weight_b, limit,
    CLIP: tl.constexpr, NEEDS_A: tl.constexpr, NEEDS_B: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both gradients of one read; with y the output, nothing where it reached the limit."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < units * UNIT
    grad = tl.load(grad_ptr + i, mask=ok, other=0.0).to(tl.float32)
    if CLIP:
        y = tl.load(y_ptr + i, mask=ok, other=0.0).to(tl.float32)
        grad = tl.where((y >= limit) | (y <= -limit), 0.0, grad)
    if NEEDS_A:
        tl.store(grad_a_ptr + i, (grad * weight_a).to(grad_a_ptr.dtype.element_ty), mask=ok)
    if NEEDS_B:
        tl.store(grad_b_ptr + i, (grad * weight_b).to(grad_b_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows", "units_a", "units_b"])
def mp_cat_kernel(
    a_ptr, b_ptr, out_ptr, rows: tl.int64, units_a: tl.int64, units_b: tl.int64, weight_a, weight_b,
    BACKWARD: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """out [rows, Wa + Wb] = weighted a [rows, Wa] beside weighted b [rows, Wb]; backward from out to a and b."""
    width_a, width_b = units_a * UNIT, units_b * UNIT
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(width_a + width_b, BW)
    row = (program // blocks * BR + tl.arange(0, BR))[:, None]
    col = (program % blocks * BW + tl.arange(0, BW))[None, :]
    of_a = (row < rows) & (col < width_a)
    of_b = (row < rows) & (col >= width_a) & (col < width_a + width_b)
    at_a, at_b = a_ptr + row * width_a + col, b_ptr + row * width_b + (col - width_a)
    at_out = out_ptr + row * (width_a + width_b) + col
    if BACKWARD:
        grad = tl.load(at_out, mask=of_a | of_b, other=0.0).to(tl.float32)
        tl.store(at_a, (grad * weight_a).to(a_ptr.dtype.element_ty), mask=of_a)
        tl.store(at_b, (grad * weight_b).to(b_ptr.dtype.element_ty), mask=of_b)
    else:
        a = tl.load(at_a, mask=of_a, other=0.0).to(tl.float32)
        b = tl.load(at_b, mask=of_b, other=0.0).to(tl.float32)
        value = tl.where(col < width_a, a * weight_a, b * weight_b)
        tl.store(at_out, value.to(out_ptr.dtype.element_ty), mask=of_a | of_b)


@triton.jit
def _row_offsets(first, rows, N, inner, INNER_ONE: tl.constexpr, BR: tl.constexpr):
    """(row index, offset of its first element, whether it exists); a row is the N elements of one norm."""
    row = first + tl.arange(0, BR)
    if INNER_ONE:
        offset = row * N
    else:
        outer = row // inner
        offset = outer * N * inner + (row - outer * inner)
    return row, offset, row < rows


@triton.jit(do_not_specialize=["rows", "units", "inner"])
def pixel_norm_fwd_kernel(
    x_ptr, out_ptr, act_ptr, rms_ptr, rows: tl.int64, units: tl.int64, inner: tl.int64, eps, gain,
    SILU: tl.constexpr, INNER_ONE: tl.constexpr, ONE_TILE: tl.constexpr, UNIT: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x [rows, N] -> x / (eps + rms), and rms; with SILU also gain silu of what was stored."""
    N = units * UNIT
    step = 1 if INNER_ONE else inner
    row, offset, row_ok = _row_offsets(tl.program_id(0).to(tl.int64) * BR, rows, N, inner, INNER_ONE, BR)
    n = tl.arange(0, BN)
    total = tl.zeros([BR], tl.float32)
    x = tl.zeros([BR, BN], tl.float32)
    for first in range(0, N, BN):
        ok = row_ok[:, None] & (first + n < N)[None, :]
        x = tl.load(x_ptr + offset[:, None] + ((first + n) * step)[None, :], mask=ok, other=0.0).to(tl.float32)
        total += tl.sum(x * x, axis=1)
    rms = tl.sqrt_rn(total / N.to(tl.float32))
    tl.store(rms_ptr + row, rms, mask=row_ok)
    factor = 1.0 / (rms + eps)
    for first in range(0, N, BN):
        at = offset[:, None] + ((first + n) * step)[None, :]
        ok = row_ok[:, None] & (first + n < N)[None, :]
        if not ONE_TILE:
            x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
        y = (x * factor[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, y, mask=ok)
        if SILU:
            z = y.to(tl.float32)
            tl.store(act_ptr + at, (z * gain / (1.0 + tl.exp(-z))).to(act_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows", "units", "inner"])
def pixel_norm_bwd_kernel(
    grad_ptr, grad_act_ptr, y_ptr, rms_ptr, out_ptr, rows: tl.int64, units: tl.int64, inner: tl.int64, eps, gain,
    SILU: tl.constexpr, INNER_ONE: tl.constexpr, ONE_TILE: tl.constexpr, UNIT: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """grad / (rms + eps) - y <grad, y> / (N rms), with y the output of forward; no second term where rms is 0."""
    N = units * UNIT
    step = 1 if INNER_ONE else inner
    row, offset, row_ok = _row_offsets(tl.program_id(0).to(tl.int64) * BR, rows, N, inner, INNER_ONE, BR)
    n = tl.arange(0, BN)
    total = tl.zeros([BR], tl.float32)
    grad = tl.zeros([BR, BN], tl.float32)
    y = tl.zeros([BR, BN], tl.float32)
    for first in range(0, N, BN):
        at = offset[:, None] + ((first + n) * step)[None, :]
        ok = row_ok[:, None] & (first + n < N)[None, :]
        grad = tl.load(grad_ptr + at, mask=ok, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if SILU:
            grad += tl.load(grad_act_ptr + at, mask=ok, other=0.0).to(tl.float32) * _silu_slope(y) * gain
        total += tl.sum(grad * y, axis=1)
    rms = tl.load(rms_ptr + row, mask=row_ok, other=1.0)
    slope = tl.where(rms == 0.0, 0.0, total / (N.to(tl.float32) * tl.where(rms == 0.0, 1.0, rms)))
    factor = 1.0 / (rms + eps)
    for first in range(0, N, BN):
        at = offset[:, None] + ((first + n) * step)[None, :]
        ok = row_ok[:, None] & (first + n < N)[None, :]
        if not ONE_TILE:
            grad = tl.load(grad_ptr + at, mask=ok, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + at, mask=ok, other=0.0).to(tl.float32)
            if SILU:
                grad += tl.load(grad_act_ptr + at, mask=ok, other=0.0).to(tl.float32) * _silu_slope(y) * gain
        value = grad * factor[:, None] - y * slope[:, None]
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _frame_tile(frame, channel, pixel, C, frames, P, CHANNELS_LAST: tl.constexpr):
    """Offsets [pixels, channels] of one frame of (B, C, F, P) or, CHANNELS_LAST, (B, F, P, C); and what exists."""
    ok = (pixel < P)[:, None] & (channel < C)[None, :]
    if CHANNELS_LAST:
        return (frame * P + pixel)[:, None] * C + channel[None, :], ok
    batch = frame // frames
    return ((batch * C + channel)[None, :] * frames + (frame - batch * frames)) * P + pixel[:, None], ok


@triton.jit(do_not_specialize=["channel_units", "frames", "pixel_units"])
def modulated_silu_fwd_kernel(
    x_ptr, scale_ptr, out_ptr, channel_units: tl.int64, frames: tl.int64, pixel_units: tl.int64, gain,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """gain silu(x scale), scale [frame, channel]."""
    C = channel_units * (UNIT if CHANNELS_LAST else 1)
    P = pixel_units * (1 if CHANNELS_LAST else UNIT)
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(P, BP)
    frame = program // blocks
    pixel = (program - frame * blocks) * BP + tl.arange(0, BP)
    channel = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    at, ok = _frame_tile(frame, channel, pixel, C, frames, P, CHANNELS_LAST)
    scale = tl.load(scale_ptr + frame * C + channel, mask=channel < C, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32) * scale[None, :]
    tl.store(out_ptr + at, (z * gain / (1.0 + tl.exp(-z))).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["channel_units", "frames", "pixel_units"])
def modulated_silu_bwd_kernel(
    grad_ptr, x_ptr, scale_ptr, grad_x_ptr, grad_scale_ptr,
    channel_units: tl.int64, frames: tl.int64, pixel_units: tl.int64, gain,
    NEEDS_X: tl.constexpr, NEEDS_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A program walks all pixels of a frame, so the sum for the scale needs neither atomics nor a second launch."""
    C = channel_units * (UNIT if CHANNELS_LAST else 1)
    P = pixel_units * (1 if CHANNELS_LAST else UNIT)
    frame = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    scale = tl.load(scale_ptr + frame * C + channel, mask=channel < C, other=0.0).to(tl.float32)
    total = tl.zeros([BC], tl.float32)
    for first in range(0, P, BP):
        at, ok = _frame_tile(frame, channel, first + tl.arange(0, BP), C, frames, P, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=ok, other=0.0).to(tl.float32)
        grad = grad * _silu_slope(x * scale[None, :]) * gain
        if NEEDS_X:
            tl.store(grad_x_ptr + at, (grad * scale[None, :]).to(grad_x_ptr.dtype.element_ty), mask=ok)
        if NEEDS_SCALE:
            total += tl.sum(tl.where(ok, grad * x, 0.0), axis=0)
    if NEEDS_SCALE:
        value = total.to(grad_scale_ptr.dtype.element_ty)
        tl.store(grad_scale_ptr + frame * C + channel, value, mask=channel < C)


@triton.jit(do_not_specialize=["channel_units", "frames", "pixel_units"])
def mp_sum_frames_fwd_kernel(
    a_ptr, b_ptr, t_ptr, out_ptr, channel_units: tl.int64, frames: tl.int64, pixel_units: tl.int64,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    C = channel_units * (UNIT if CHANNELS_LAST else 1)
    P = pixel_units * (1 if CHANNELS_LAST else UNIT)
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(P, BP)
    frame = program // blocks
    pixel = (program - frame * blocks) * BP + tl.arange(0, BP)
    channel = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    at, ok = _frame_tile(frame, channel, pixel, C, frames, P, CHANNELS_LAST)
    t = tl.load(t_ptr + frame).to(tl.float32)
    norm = tl.sqrt_rn((1.0 - t) * (1.0 - t) + t * t)
    a = tl.load(a_ptr + at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=ok, other=0.0).to(tl.float32)
    y = a * ((1.0 - t) / norm) + b * (t / norm)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["channel_units", "frames", "pixel_units"])
def mp_sum_frames_bwd_kernel(
    grad_ptr, a_ptr, b_ptr, t_ptr, grad_a_ptr, grad_b_ptr, part_ptr,
    channel_units: tl.int64, frames: tl.int64, pixel_units: tl.int64,
    NEEDS_A: tl.constexpr, NEEDS_B: tl.constexpr, NEEDS_T: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """For t, ((1 - t) b - t a) grad / norm^3 summed over the tile, in its place of part [frame, tile]."""
    C = channel_units * (UNIT if CHANNELS_LAST else 1)
    P = pixel_units * (1 if CHANNELS_LAST else UNIT)
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(P, BP)
    frame = program // blocks
    pixel = (program - frame * blocks) * BP + tl.arange(0, BP)
    channel = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    at, ok = _frame_tile(frame, channel, pixel, C, frames, P, CHANNELS_LAST)
    t = tl.load(t_ptr + frame).to(tl.float32)
    norm = tl.sqrt_rn((1.0 - t) * (1.0 - t) + t * t)
    grad = tl.load(grad_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if NEEDS_A:
        tl.store(grad_a_ptr + at, (grad * ((1.0 - t) / norm)).to(grad_a_ptr.dtype.element_ty), mask=ok)
    if NEEDS_B:
        tl.store(grad_b_ptr + at, (grad * (t / norm)).to(grad_b_ptr.dtype.element_ty), mask=ok)
    if NEEDS_T:
        a = tl.load(a_ptr + at, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + at, mask=ok, other=0.0).to(tl.float32)
        slope = tl.sum(tl.sum(((1.0 - t) * b - t * a) * grad, axis=1), axis=0) / (norm * norm * norm)
        tl.store(part_ptr + program * tl.num_programs(1) + tl.program_id(1), slope)


def plan_elementwise(kernel, out: torch.Tensor, outputs: tuple[str, ...] = ("out_ptr",), **args) -> list[Launch]:
    """One launch over all elements; every tensor but the named outputs is brought to the order of `out`."""
    count = out.numel()
    unit = common_unit(count)
    for name, value in args.items():
        if isinstance(value, torch.Tensor) and name not in outputs:
            args[name] = ordered_as(value, out)
    args |= {"units": count // unit, "UNIT": unit, "BLOCK": BLOCK}
    return [Launch(kernel, (-(-count // BLOCK),), args, num_warps=8, num_stages=1)] if count else []


def mp_silu(x: torch.Tensor, out: torch.Tensor) -> None:
    run(plan_elementwise(mp_silu_fwd_kernel, out, x_ptr=x, out_ptr=out, gain=SILU_GAIN), x.device)


def mp_silu_backward(grad_out: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor) -> None:
    args: dict[str, Any] = {"grad_ptr": grad_out, "x_ptr": x, "out_ptr": grad_x, "gain": SILU_GAIN}
    run(plan_elementwise(mp_silu_bwd_kernel, grad_x, **args), x.device)


def _sum_weights(t: float, limit: float | None) -> dict:
    norm = math.hypot(1 - t, t)
    clip = {"limit": 0.0 if limit is None else limit, "CLIP": limit is not None}
    return {"weight_a": (1 - t) / norm, "weight_b": t / norm} | clip


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float, limit: float | None, out: torch.Tensor) -> None:
    plan = plan_elementwise(mp_sum_fwd_kernel, out, a_ptr=a, b_ptr=b, out_ptr=out, **_sum_weights(t, limit))
    run(plan, a.device)


def mp_sum_backward(
    grad_out: torch.Tensor,
    out: torch.Tensor | None,
    t: float,
    limit: float | None,
    grad_a: torch.Tensor | None,
    grad_b: torch.Tensor | None,
) -> None:
    """Writes those gradients that are not None; `out` is that of forward, wanted where there is a limit."""
    like = grad_a if grad_a is not None else grad_b
    if like is None:
        return
    args: dict[str, Any] = {"grad_ptr": grad_out, "y_ptr": grad_out if out is None else out}
    args |= {"grad_a_ptr": like if grad_a is None else grad_a, "grad_b_ptr": like if grad_b is None else grad_b}
    args |= {"NEEDS_A": grad_a is not None, "NEEDS_B": grad_b is not None} | _sum_weights(t, limit)
    run(plan_elementwise(mp_sum_bwd_kernel, like, ("grad_a_ptr", "grad_b_ptr"), **args), grad_out.device)


def _memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """That of all of them, contiguous if they are both."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensors[0].ndim)
    if channels_last is None or all(x.is_contiguous() for x in tensors):
        return torch.contiguous_format
    return channels_last


def plan_cat(
    a: torch.Tensor, b: torch.Tensor, dim: int, weight_a: float, weight_b: float, out: torch.Tensor, backward: bool
) -> list[Launch]:
    """All of one memory format; a and b are written instead of read if backward."""
    channels_last = _memory_format(out if not backward else a, out if not backward else b) != torch.contiguous_format
    order = [0, *range(2, out.ndim), 1] if channels_last else list(range(out.ndim))
    place = order.index(dim)
    rows, inner = (math.prod(out.shape[d] for d in part) for part in (order[:place], order[place + 1 :]))
    width_a, width_b = a.shape[dim] * inner, b.shape[dim] * inner
    unit = common_unit(width_a, width_b)
    block_w = min(triton.next_power_of_2(width_a + width_b), 1024)
    block_r = BLOCK // block_w
    args: dict[str, Any] = {
        "a_ptr": a,
        "b_ptr": b,
        "out_ptr": out,
        "weight_a": weight_a,
        "weight_b": weight_b,
        "rows": rows,
    }
    args |= {"units_a": width_a // unit, "units_b": width_b // unit, "UNIT": unit, "BACKWARD": backward}
    args |= {"BR": block_r, "BW": block_w}
    grid = (-(-rows // block_r) * -(-(width_a + width_b) // block_w),)
    return [Launch(mp_cat_kernel, grid, args, num_warps=8, num_stages=1)]


def mp_cat(a: torch.Tensor, b: torch.Tensor, dim: int, weight_a: float, weight_b: float, out: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    a, b = (x.contiguous(memory_format=_memory_format(out)) for x in (a, b))
    run(plan_cat(a, b, dim, weight_a, weight_b, out, False), out.device)


def mp_cat_backward(
    grad_out: torch.Tensor, dim: int, weight_a: float, weight_b: float, grad_a: torch.Tensor, grad_b: torch.Tensor
) -> None:
    if grad_out.numel() == 0:
        return
    grad_out = grad_out.contiguous(memory_format=_memory_format(grad_a, grad_b))
    run(plan_cat(grad_a, grad_b, dim, weight_a, weight_b, grad_out, True), grad_out.device)


def _rows(out: torch.Tensor, dim: int) -> tuple[int, int] | None:
    """(rows, elements between neighbours along dim) of a dense tensor; None if its other dims are permuted."""
    others = [d for d in range(out.ndim) if d != dim and out.shape[d] > 1]
    strides = [out.stride(d) for d in others]
    if strides != sorted(strides, reverse=True):
        return None
    inner = math.prod(out.shape[d] for d in others if out.stride(d) < out.stride(dim)) if out.shape[dim] > 1 else 1
    return out.numel() // out.shape[dim], inner


def plan_norm(kernel, dim: int, eps: float, **tensors: torch.Tensor) -> list[Launch]:
    """Forward from x_ptr to out_ptr, with act_ptr the activation too; backward from grad_ptr and y_ptr to out_ptr, with
    grad_act_ptr that of the activation."""
    out = tensors["out_ptr"]
    rows, inner = _rows(out, dim)
    N = out.shape[dim]
    unit = common_unit(N)
    width = min(triton.next_power_of_2(N), WIDEST)
    block = max(1, BLOCK // 2 // width)
    args: dict = {
        name: t if name in ("out_ptr", "act_ptr", "rms_ptr") else ordered_as(t, out) for name, t in tensors.items()
    }
    activation = "act_ptr" if "x_ptr" in args else "grad_act_ptr"
    args |= {"SILU": activation in args, activation: args.get(activation, out), "gain": SILU_GAIN}
    args |= {"rows": rows, "units": N // unit, "inner": inner, "eps": eps, "UNIT": unit}
    args |= {"INNER_ONE": inner == 1, "ONE_TILE": width >= N, "BR": block, "BN": width}
    return [Launch(kernel, (-(-rows // block),), args, num_warps=4 if width * block <= 2048 else 8, num_stages=1)]


def _norm(kernel, dim: int, eps: float, out: torch.Tensor, act: torch.Tensor | None = None, **tensors) -> None:
    if out.numel() == 0:
        return
    wanted = {"out_ptr": out} if act is None else {"out_ptr": out, "act_ptr": act}
    dense = wanted
    if _rows(out, dim) is None:
        dense = {name: torch.empty(t.shape, dtype=t.dtype, device=t.device) for name, t in wanted.items()}
    run(plan_norm(kernel, dim, eps, **dense, **tensors), out.device)
    for name, t in wanted.items():
        if dense[name] is not t:
            t.copy_(dense[name])


def pixel_norm(
    x: torch.Tensor, dim: int, eps: float, out: torch.Tensor, rms: torch.Tensor, act: torch.Tensor | None = None
) -> None:
    """Also writes mp_silu of the result to `act` if given."""
    _norm(pixel_norm_fwd_kernel, dim, eps, out, act, x_ptr=x, rms_ptr=rms)


def pixel_norm_backward(
    grad_out: torch.Tensor,
    out: torch.Tensor,
    rms: torch.Tensor,
    dim: int,
    eps: float,
    grad_x: torch.Tensor,
    grad_act: torch.Tensor | None = None,
) -> None:
    """From the output, so that the input need not be kept."""
    extra = {} if grad_act is None else {"grad_act_ptr": grad_act}
    _norm(pixel_norm_bwd_kernel, dim, eps, grad_x, grad_ptr=grad_out, y_ptr=out, rms_ptr=rms, **extra)


def is_channels_last(x: torch.Tensor) -> bool:
    return x.permute(0, *range(2, x.ndim), 1).is_contiguous()


def _walkable(x: torch.Tensor) -> torch.Tensor:
    """x itself where the kernels of frames can write to it, else a contiguous tensor beside it."""
    ok = x.is_contiguous() or is_channels_last(x)
    return x if ok else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def plan_frames(kernel, like: torch.Tensor, outputs: tuple[str, ...], *, walk: bool = False, **args) -> list[Launch]:
    """A launch over tiles of pixels and channels of each frame of (B, C, F, ...), or (B, C): F is dim 2.

    All tensors of the shape of `like` get its order, contiguous or channels-last, but the outputs, which have it. With
    `walk` one program takes all pixels of a frame.
    """
    C, frames = like.shape[1], like.shape[2] if like.ndim > 2 else 1
    P = math.prod(like.shape[3:])
    channels_last = not like.is_contiguous()
    for name, value in args.items():
        if isinstance(value, torch.Tensor) and value.shape == like.shape and name not in outputs:
            args[name] = ordered_as(value, like)
    unit = common_unit(C if channels_last else P)
    block_c = min(triton.next_power_of_2(C), 64) if channels_last else min(triton.next_power_of_2(C), 16)
    block_p = min(triton.next_power_of_2(P), BLOCK // block_c)
    args |= {"channel_units": C // (unit if channels_last else 1), "pixel_units": P // (1 if channels_last else unit)}
    args |= {"frames": frames, "CHANNELS_LAST": channels_last, "UNIT": unit, "BP": block_p, "BC": block_c}
    # Only the first axis of a grid may have more than 65535 programs.
    grid = (like.shape[0] * frames * (1 if walk else -(-P // block_p)), -(-C // block_c))
    return [Launch(kernel, grid, args, num_warps=8 if block_c * block_p > 2048 else 4, num_stages=1)]


def modulated_silu(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    dense = _walkable(out)
    args: dict[str, Any] = {"x_ptr": x, "scale_ptr": scale.contiguous(), "out_ptr": dense, "gain": SILU_GAIN}
    run(plan_frames(modulated_silu_fwd_kernel, dense, ("out_ptr", "scale_ptr"), **args), x.device)
    if dense is not out:
        out.copy_(dense)


def modulated_silu_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    grad_x: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
) -> None:
    """Writes those gradients that are not None."""
    if x.numel() == 0:
        if grad_scale is not None:
            grad_scale.zero_()
        return
    like = x if grad_x is None else grad_x
    dense = _walkable(like) if grad_x is not None or x.is_contiguous() or is_channels_last(x) else x.contiguous()
    args: dict[str, Any] = {
        "grad_ptr": grad_out,
        "x_ptr": x,
        "scale_ptr": scale.contiguous(),
        "grad_x_ptr": dense,
        "gain": SILU_GAIN,
    }
    args |= {"grad_scale_ptr": scale if grad_scale is None else grad_scale}
    args |= {"NEEDS_X": grad_x is not None, "NEEDS_SCALE": grad_scale is not None}
    outputs = ("grad_x_ptr", "scale_ptr", "grad_scale_ptr")
    run(plan_frames(modulated_silu_bwd_kernel, dense, outputs, walk=True, **args), x.device)
    if grad_x is not None and dense is not grad_x:
        grad_x.copy_(dense)


def _per_frame(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t, constant but for dims 0 and 2 of x, as (B, F)."""
    t = t.reshape((1,) * (x.ndim - t.ndim) + t.shape)
    t = t.select(1, 0)
    for _ in range(x.ndim - 3):
        t = t.squeeze(-1)
    if x.ndim == 2:
        t = t[:, None]
    return t.expand(x.shape[0], x.shape[2] if x.ndim > 2 else 1).contiguous()


def mp_sum_tensor(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    dense = _walkable(out)
    args: dict[str, Any] = {"a_ptr": a, "b_ptr": b, "t_ptr": _per_frame(t, a), "out_ptr": dense}
    run(plan_frames(mp_sum_frames_fwd_kernel, dense, ("out_ptr", "t_ptr"), **args), a.device)
    if dense is not out:
        out.copy_(dense)


def mp_sum_tensor_backward(
    grad_out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    t: torch.Tensor,
    grad_a: torch.Tensor | None,
    grad_b: torch.Tensor | None,
    grad_t: torch.Tensor | None,
) -> None:
    """Writes those gradients that are not None; that of t is summed in a second launch, in a fixed order."""
    if a.numel() == 0:
        if grad_t is not None:
            grad_t.zero_()
        return
    # One order for all: a's, of which grad_a is, or contiguous; grad_b has b's.
    like = _walkable(a if grad_a is None else grad_a)
    made_b = None if grad_b is None else torch.empty_like(like)
    args: dict[str, Any] = {"grad_ptr": grad_out, "a_ptr": a, "b_ptr": b, "t_ptr": _per_frame(t, a)}
    args |= {"grad_a_ptr": like, "grad_b_ptr": like if made_b is None else made_b, "part_ptr": a}
    args |= {"NEEDS_A": grad_a is not None, "NEEDS_B": grad_b is not None, "NEEDS_T": grad_t is not None}
    outputs = ("grad_a_ptr", "grad_b_ptr", "t_ptr", "part_ptr")
    (launch,) = plan_frames(mp_sum_frames_bwd_kernel, like, outputs, **args)
    part = a.new_empty(launch.grid, dtype=torch.float32)
    launch.args["part_ptr"] = part
    run([launch], a.device)
    if grad_a is not None and like is not grad_a:
        grad_a.copy_(like)
    if grad_b is not None and made_b is not None:
        grad_b.copy_(made_b)
    if grad_t is not None:
        frames = a.shape[2] if a.ndim > 2 else 1
        per_frame = part.view(a.shape[0], frames, -1).sum(dim=2)
        shape = (a.shape[0], 1, *per_frame.shape[1:], *[1] * (a.ndim - 3)) if a.ndim > 2 else (a.shape[0], 1)
        grad_t.copy_(per_frame.view(shape).sum_to_size(t.shape))
