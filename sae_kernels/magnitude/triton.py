"""mp_silu, mp_sum with a number, and pixel_norm in Triton: each tensor is read once and written once, both ways.

Everything is computed in fp32 and rounded once. Tensors are walked in the order of their memory.
"""

import math

import torch
import triton
import triton.language as tl

from .._launch import Launch, run

SILU_GAIN = 1 / 0.596
BLOCK = 4096  # elements of a program: 16 a thread, whole 16-byte accesses in every dtype
WIDEST = 4096  # channels that pixel_norm holds in one tile; more are walked twice


@triton.jit(do_not_specialize=["count"])
def mp_silu_fwd_kernel(x_ptr, out_ptr, count: tl.int64, gain, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (x * gain / (1.0 + tl.exp(-x))).to(out_ptr.dtype.element_ty), mask=i < count)


@triton.jit(do_not_specialize=["count"])
def mp_silu_bwd_kernel(grad_ptr, x_ptr, out_ptr, count: tl.int64, gain, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-x))
    slope = s * (1.0 + x * (1.0 - s))
    tl.store(out_ptr + i, (grad * slope * gain).to(out_ptr.dtype.element_ty), mask=i < count)


@triton.jit(do_not_specialize=["count"])
def mp_sum_fwd_kernel(a_ptr, b_ptr, out_ptr, count: tl.int64, weight_a, weight_b, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (a * weight_a + b * weight_b).to(out_ptr.dtype.element_ty), mask=i < count)


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


@triton.jit(do_not_specialize=["rows", "N", "inner"])
def pixel_norm_fwd_kernel(
    x_ptr, out_ptr, rms_ptr, rows: tl.int64, N: tl.int64, inner: tl.int64, eps,
    INNER_ONE: tl.constexpr, ONE_TILE: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x [rows, N] -> x / (eps + rms), and rms."""
    row, offset, row_ok = _row_offsets(tl.program_id(0).to(tl.int64) * BR, rows, N, inner, INNER_ONE, BR)
    n = tl.arange(0, BN)
    total = tl.zeros([BR], tl.float32)
    x = tl.zeros([BR, BN], tl.float32)
    for first in range(0, N, BN):
        ok = row_ok[:, None] & (first + n < N)[None, :]
        x = tl.load(x_ptr + offset[:, None] + ((first + n) * inner)[None, :], mask=ok, other=0.0).to(tl.float32)
        total += tl.sum(x * x, axis=1)
    rms = tl.sqrt_rn(total / N.to(tl.float32))
    tl.store(rms_ptr + row, rms, mask=row_ok)
    factor = 1.0 / (rms + eps)
    for first in range(0, N, BN):
        at = offset[:, None] + ((first + n) * inner)[None, :]
        ok = row_ok[:, None] & (first + n < N)[None, :]
        if not ONE_TILE:
            x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (x * factor[:, None]).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows", "N", "inner"])
def pixel_norm_bwd_kernel(
    grad_ptr, y_ptr, rms_ptr, out_ptr, rows: tl.int64, N: tl.int64, inner: tl.int64, eps,
    INNER_ONE: tl.constexpr, ONE_TILE: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """grad / (rms + eps) - y <grad, y> / (N rms), with y the output of forward; no second term where rms is 0."""
    row, offset, row_ok = _row_offsets(tl.program_id(0).to(tl.int64) * BR, rows, N, inner, INNER_ONE, BR)
    n = tl.arange(0, BN)
    total = tl.zeros([BR], tl.float32)
    grad = tl.zeros([BR, BN], tl.float32)
    y = tl.zeros([BR, BN], tl.float32)
    for first in range(0, N, BN):
        at = offset[:, None] + ((first + n) * inner)[None, :]
        ok = row_ok[:, None] & (first + n < N)[None, :]
        grad = tl.load(grad_ptr + at, mask=ok, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=ok, other=0.0).to(tl.float32)
        total += tl.sum(grad * y, axis=1)
    rms = tl.load(rms_ptr + row, mask=row_ok, other=1.0)
    slope = tl.where(rms == 0.0, 0.0, total / (N.to(tl.float32) * tl.where(rms == 0.0, 1.0, rms)))
    factor = 1.0 / (rms + eps)
    for first in range(0, N, BN):
        at = offset[:, None] + ((first + n) * inner)[None, :]
        ok = row_ok[:, None] & (first + n < N)[None, :]
        if not ONE_TILE:
            grad = tl.load(grad_ptr + at, mask=ok, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + at, mask=ok, other=0.0).to(tl.float32)
        value = grad * factor[:, None] - y * slope[:, None]
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=ok)


def _ordered_as(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x in the memory order of the dense `out`, copied only if it is in another."""
    same = all(n == 1 or s == t for n, s, t in zip(x.shape, x.stride(), out.stride(), strict=True))
    return x if same else torch.empty_like(out, dtype=x.dtype).copy_(x)


def plan_elementwise(kernel, out: torch.Tensor, **args) -> list[Launch]:
    count = out.numel()
    args = {name: _ordered_as(v, out) if isinstance(v, torch.Tensor) else v for name, v in args.items()}
    args |= {"out_ptr": out, "count": count, "BLOCK": BLOCK}
    return [Launch(kernel, (-(-count // BLOCK),), args, num_warps=8, num_stages=1)] if count else []


def mp_silu(x: torch.Tensor, out: torch.Tensor) -> None:
    run(plan_elementwise(mp_silu_fwd_kernel, out, x_ptr=x, gain=SILU_GAIN), x.device)


def mp_silu_backward(grad_out: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor) -> None:
    run(plan_elementwise(mp_silu_bwd_kernel, grad_x, grad_ptr=grad_out, x_ptr=x, gain=SILU_GAIN), x.device)


def scaled_copy(x: torch.Tensor, factor: float, out: torch.Tensor) -> None:
    torch.mul(x, factor, out=out)


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float, out: torch.Tensor) -> None:
    norm = math.hypot(1 - t, t)
    weights = {"weight_a": (1 - t) / norm, "weight_b": t / norm}
    run(plan_elementwise(mp_sum_fwd_kernel, out, a_ptr=a, b_ptr=b, **weights), a.device)


def _rows(out: torch.Tensor, dim: int) -> tuple[int, int] | None:
    """(rows, elements between neighbours along dim) of a dense tensor; None if its other dims are permuted."""
    others = [d for d in range(out.ndim) if d != dim and out.shape[d] > 1]
    strides = [out.stride(d) for d in others]
    if strides != sorted(strides, reverse=True):
        return None
    inner = math.prod(out.shape[d] for d in others if out.stride(d) < out.stride(dim)) if out.shape[dim] > 1 else 1
    return out.numel() // out.shape[dim], inner


def plan_norm(kernel, dim: int, eps: float, **tensors: torch.Tensor) -> list[Launch]:
    out = tensors["out_ptr"]
    rows, inner = _rows(out, dim)
    N = out.shape[dim]
    width = min(triton.next_power_of_2(N), WIDEST)
    block = max(1, BLOCK // 2 // width)
    args: dict = {name: t if name in ("out_ptr", "rms_ptr") else _ordered_as(t, out) for name, t in tensors.items()}
    args |= {"rows": rows, "N": N, "inner": inner, "eps": eps, "INNER_ONE": inner == 1, "ONE_TILE": width >= N}
    args |= {"BR": block, "BN": width}
    return [Launch(kernel, (-(-rows // block),), args, num_warps=4 if width * block <= 2048 else 8, num_stages=1)]


def _norm(kernel, dim: int, eps: float, out: torch.Tensor, **tensors: torch.Tensor) -> None:
    if out.numel() == 0:
        return
    dense = out if _rows(out, dim) is not None else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    run(plan_norm(kernel, dim, eps, out_ptr=dense, **tensors), out.device)
    if dense is not out:
        out.copy_(dense)


def pixel_norm(x: torch.Tensor, dim: int, eps: float, out: torch.Tensor, rms: torch.Tensor) -> None:
    _norm(pixel_norm_fwd_kernel, dim, eps, out, x_ptr=x, rms_ptr=rms)


def pixel_norm_backward(
    grad_out: torch.Tensor, out: torch.Tensor, rms: torch.Tensor, dim: int, eps: float, grad_x: torch.Tensor
) -> None:
    """From the output, so that the input need not be kept."""
    _norm(pixel_norm_bwd_kernel, dim, eps, grad_x, grad_ptr=grad_out, y_ptr=out, rms_ptr=rms)
