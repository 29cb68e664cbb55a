"""normalize_weight in Triton: a program reads one output channel, twice if it is too long for a tile.

Everything is computed in fp32 and rounded once.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .._launch import Launch, run
from .._tensors import common_unit, ordered_as

WEIGHT_EPS = 1e-4


@triton.jit(do_not_specialize=["units"])
def normalize_weight_fwd_kernel(
    w_ptr, gain_ptr, out_ptr, rms_ptr, units: tl.int64, factor, eps,
    HAS_GAIN: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One output channel w[i] of N elements to w[i] gain factor / (rms + eps); factor holds 1 / sqrt(N)."""
    N = units * UNIT
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for first in range(0, N, BN):
        w = tl.load(w_ptr + row * N + first + n, mask=first + n < N, other=0.0).to(tl.float32)
        total += w * w
    rms = tl.sqrt_rn(tl.sum(total, axis=0) / N.to(tl.float32))
    tl.store(rms_ptr + row, rms)
    scale = factor / (rms + eps)
    if HAS_GAIN:
        scale = scale * tl.load(gain_ptr).to(tl.float32)
    for first in range(0, N, BN):
        w = tl.load(w_ptr + row * N + first + n, mask=first + n < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * N + first + n, (w * scale).to(out_ptr.dtype.element_ty), mask=first + n < N)


@triton.jit(do_not_specialize=["units"])
def normalize_weight_bwd_kernel(
    grad_ptr, w_ptr, gain_ptr, rms_ptr, grad_w_ptr, part_ptr, units: tl.int64, factor, eps,
    NEEDS_W: tl.constexpr, NEEDS_GAIN: tl.constexpr, HAS_GAIN: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Remove the part of the gradient along w[i]; part[i] is the channel's share of the gain's gradient."""
    N = units * UNIT
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for first in range(0, N, BN):
        w = tl.load(w_ptr + row * N + first + n, mask=first + n < N, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * N + first + n, mask=first + n < N, other=0.0).to(tl.float32)
        total += w * grad
    rms = tl.load(rms_ptr + row)
    dot = tl.sum(total, axis=0) / (rms + eps)
    if NEEDS_GAIN:
        tl.store(part_ptr + row, dot * factor)
    if NEEDS_W:
        scale = factor / (rms + eps)
        if HAS_GAIN:
            scale = scale * tl.load(gain_ptr).to(tl.float32)
        slope = tl.where(rms == 0.0, 0.0, dot * scale / (N.to(tl.float32) * tl.where(rms == 0.0, 1.0, rms)))
        for first in range(0, N, BN):
            w = tl.load(w_ptr + row * N + first + n, mask=first + n < N, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + row * N + first + n, mask=first + n < N, other=0.0).to(tl.float32)
            value = grad * scale - w * slope
            tl.store(grad_w_ptr + row * N + first + n, value.to(grad_w_ptr.dtype.element_ty), mask=first + n < N)


def plan_weight(kernel, w: torch.Tensor, gain: torch.Tensor | None, factor: float, **args) -> list[Launch]:
    """Rows of w, each contiguous in memory."""
    N = math.prod(w.shape[1:])
    unit = common_unit(N)
    args |= {"w_ptr": w, "gain_ptr": w if gain is None else gain, "HAS_GAIN": gain is not None}
    args |= {"units": N // unit, "UNIT": unit, "factor": factor * N**-0.5, "eps": WEIGHT_EPS}
    args |= {"BN": min(triton.next_power_of_2(N), 2048)}
    return [Launch(kernel, (w.shape[0],), args, num_warps=4, num_stages=1)] if w.shape[0] else []


def _in_rows(x: torch.Tensor) -> bool:
    """A dense tensor whose first dimension is the slowest in memory."""
    return x.shape[0] < 2 or x.stride(0) == math.prod(x.shape[1:])


def normalize_weight(
    w: torch.Tensor, gain: torch.Tensor | None, factor: float, out: torch.Tensor, rms: torch.Tensor
) -> None:
    dense = out if _in_rows(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    args: dict[str, Any] = {"out_ptr": dense, "rms_ptr": rms}
    run(plan_weight(normalize_weight_fwd_kernel, ordered_as(w, dense), gain, factor, **args), w.device)
    if dense is not out:
        out.copy_(dense)


def normalize_weight_backward(
    grad_out: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None,
    factor: float,
    rms: torch.Tensor,
    grad_w: torch.Tensor | None,
    grad_gain: torch.Tensor | None,
) -> None:
    """Write the gradients that are not None; that of the gain is summed over channels in a second launch."""
    if grad_w is None or not _in_rows(grad_w):
        dense = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    else:
        dense = grad_w
    part = w.new_empty(len(w) if grad_gain is not None else 0, dtype=torch.float32)
    args: dict[str, Any] = {
        "grad_ptr": ordered_as(grad_out, dense),
        "rms_ptr": rms,
        "grad_w_ptr": dense,
        "part_ptr": part,
    }
    args |= {"NEEDS_W": grad_w is not None, "NEEDS_GAIN": grad_gain is not None}
    run(plan_weight(normalize_weight_bwd_kernel, ordered_as(w, dense), gain, factor, **args), w.device)
    if grad_w is not None and dense is not grad_w:
        grad_w.copy_(dense)
    if grad_gain is not None:
        grad_gain.copy_(part.sum())
