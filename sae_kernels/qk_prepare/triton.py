"""qk_prepare in Triton: one kernel forward, one backward; each head is read once and written once, both ways.

A program takes one tile of tokens and some heads of q, k and v. Its angles are made once for all of these heads, from
fixed-point turns: position x (frequency / 2 pi as a 64-bit fraction) modulo 2^64 is exact integer arithmetic, so that
only the remainder, within an eighth of a turn of a quarter, is ever rounded to fp32. Errors of an angle: 2^-65 turns
times the position from the fraction, the fp64 rounding of the frequency, and 3 x 2^-25 of at most pi / 4 from fp32.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .._launch import Launch, run

TILE = 2048  # elements of one head that a program holds: 16 a thread
HEADS = 4  # of each of q, k, v in a program
RADIANS = tl.constexpr(2 * math.pi / 2**64)


@triton.jit
def _cos_sin(
    positions_ptr, table_ptr, batch, token, token_ok, positions_b, frames, tokens_per_frame, width, start,
    EXPLICIT: tl.constexpr, AXES: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """cos and sin [tokens, pairs], fp32; table: turns of each pair, then its axis."""
    pair = tl.arange(0, BP)
    turns = tl.load(table_ptr + pair, mask=pair < PAIRS, other=0)[None, :]
    if not EXPLICIT:
        # Division in 32 bits: there are fewer than 2^31 tokens.
        index, P = token.to(tl.int32), tokens_per_frame.to(tl.int32)
        frame = start + (index // P % frames.to(tl.int32)).to(tl.int64)
    if AXES == 1:
        if EXPLICIT:
            at = tl.load(positions_ptr + batch * positions_b + token, mask=token_ok, other=0)[:, None]
        else:
            at = frame[:, None]
    else:
        axis = tl.load(table_ptr + PAIRS + pair, mask=pair < PAIRS, other=0)[None, :]
        if EXPLICIT:
            ok = token_ok[:, None] & (pair < PAIRS)[None, :]
            at = tl.load(positions_ptr + batch * positions_b + token[:, None] * AXES + axis, mask=ok, other=0)
        else:
            row, column = index % P // width.to(tl.int32), index % P % width.to(tl.int32)
            at = tl.where(axis == 1, row.to(tl.int64)[:, None], column.to(tl.int64)[:, None])
            at = tl.where(axis == 0, frame[:, None], at)
    phase = at * turns
    quarter = (phase + (1 << 61)) >> 62
    x = (phase - (quarter << 62)).to(tl.float32) * RADIANS
    z = x * x
    # Taylor: the first terms left out are below 2e-9 and 2e-10 for |x| <= pi / 4.
    s = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    c = 1.0 - z * 0.5 + z * z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 - z * (1 / 3628800))))
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    sin = tl.where((quarter & 2) != 0, -sin, sin)
    return cos, sin


@triton.jit
def _load(ptr, row, row_ok, PAIRS: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second channels of the pairs, fp32 [tokens, pairs]."""
    if INTERLEAVED:
        # Loaded in a row, for 16-byte accesses, then taken apart in registers.
        channel = tl.arange(0, 2 * BP)
        ok = row_ok[:, None] & (channel < 2 * PAIRS)[None, :]
        both = tl.load(ptr + row[:, None] + channel[None, :], mask=ok, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [BS, BP, 2]))
    else:
        pair = tl.arange(0, BP)
        at = row[:, None] + pair[None, :]
        ok = row_ok[:, None] & (pair < PAIRS)[None, :]
        a = tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(ptr + at + PAIRS, mask=ok, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(ptr, row, row_ok, a, b, PAIRS: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BP)
        ok = row_ok[:, None] & (channel < 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(a, b), [BS, 2 * BP])
        tl.store(ptr + row[:, None] + channel[None, :], both.to(ptr.dtype.element_ty), mask=ok)
    else:
        pair = tl.arange(0, BP)
        at = row[:, None] + pair[None, :]
        ok = row_ok[:, None] & (pair < PAIRS)[None, :]
        tl.store(ptr + at, a.to(ptr.dtype.element_ty), mask=ok)
        tl.store(ptr + at + PAIRS, b.to(ptr.dtype.element_ty), mask=ok)


@triton.jit
def _forward_head(
    x_ptr, x_row, out_ptr, out_row, rms_ptr, row_ok, cos, sin, eps, D: tl.constexpr, NORMALIZE: tl.constexpr,
    PAIRS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, INTERLEAVED: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One head of a tile of tokens; BR >= D - 2 PAIRS channels are not turned."""
    total = tl.zeros([BS], tl.float32)
    if PAIRS > 0:
        a, b = _load(x_ptr, x_row, row_ok, PAIRS, BP, BS, INTERLEAVED)
        total += tl.sum(a * a + b * b, axis=1)
    if D > 2 * PAIRS:
        channel = 2 * PAIRS + tl.arange(0, BR)
        ok = row_ok[:, None] & (channel < D)[None, :]
        rest = tl.load(x_ptr + x_row[:, None] + channel[None, :], mask=ok, other=0.0)
        total += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), axis=1)
    if NORMALIZE:
        rms = tl.sqrt_rn(total * (1 / D))
        tl.store(rms_ptr, rms, mask=row_ok)
        factor = (1.0 / (rms + eps))[:, None]
    if PAIRS > 0:
        if NORMALIZE:
            a, b = a * factor, b * factor
        _store(out_ptr, out_row, row_ok, a * cos - b * sin, b * cos + a * sin, PAIRS, BP, BS, INTERLEAVED)
    if D > 2 * PAIRS:
        if NORMALIZE:
            rest = rest.to(tl.float32) * factor
        tl.store(out_ptr + out_row[:, None] + channel[None, :], rest.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _backward_head(
    grad_ptr, grad_row, y_ptr, y_row, out_ptr, out_row, rms_ptr, row_ok, cos, sin, eps,
    D: tl.constexpr, NORMALIZE: tl.constexpr,
    PAIRS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, INTERLEAVED: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """R(-p) (grad / (rms + eps) - y <grad, y> / (n rms)), with y the output of forward; no second term at rms 0."""
    if PAIRS > 0:
        a, b = _load(grad_ptr, grad_row, row_ok, PAIRS, BP, BS, INTERLEAVED)
    if D > 2 * PAIRS:
        channel = 2 * PAIRS + tl.arange(0, BR)
        ok = row_ok[:, None] & (channel < D)[None, :]
        rest = tl.load(grad_ptr + grad_row[:, None] + channel[None, :], mask=ok, other=0.0).to(tl.float32)
    if NORMALIZE:
        dot = tl.zeros([BS], tl.float32)
        if PAIRS > 0:
            y_a, y_b = _load(y_ptr, y_row, row_ok, PAIRS, BP, BS, INTERLEAVED)
            dot += tl.sum(a * y_a + b * y_b, axis=1)
        if D > 2 * PAIRS:
            y_rest = tl.load(y_ptr + y_row[:, None] + channel[None, :], mask=ok, other=0.0).to(tl.float32)
            dot += tl.sum(rest * y_rest, axis=1)
        rms = tl.load(rms_ptr, mask=row_ok, other=1.0)
        slope = tl.where(rms == 0.0, 0.0, dot * (1 / D) / tl.where(rms == 0.0, 1.0, rms))[:, None]
        factor = (1.0 / (rms + eps))[:, None]
        if PAIRS > 0:
            a, b = a * factor - y_a * slope, b * factor - y_b * slope
        if D > 2 * PAIRS:
            rest = rest * factor - y_rest * slope
    if PAIRS > 0:
        _store(out_ptr, out_row, row_ok, a * cos + b * sin, b * cos - a * sin, PAIRS, BP, BS, INTERLEAVED)
    if D > 2 * PAIRS:
        tl.store(out_ptr + out_row[:, None] + channel[None, :], rest.to(out_ptr.dtype.element_ty), mask=ok)


_SIZES = ["B", "S", "groups", "q_heads", "k_heads", "v_heads", "frames", "tokens_per_frame", "width", "start"]
_SIZES += ["positions_b", "rms_b"]
_FORWARD_STRIDES = [f"{part}_{kind}{dim}" for part in "qkv" for kind in ("", "out_") for dim in "bhs"]
_BACKWARD_STRIDES = [f"{part}_{kind}{dim}" for part in "qkv" for kind in ("grad_", "", "out_") for dim in "bhs"]


@triton.jit(do_not_specialize=[*_SIZES, *_FORWARD_STRIDES])
def qk_prepare_fwd_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr, q_rms_ptr, k_rms_ptr, v_rms_ptr, rms_b: tl.int64,
    positions_ptr, table_ptr, eps,
    B: tl.int64, S: tl.int64, groups: tl.int64, q_heads: tl.int64, k_heads: tl.int64, v_heads: tl.int64,
    frames: tl.int64, tokens_per_frame: tl.int64, width: tl.int64, start: tl.int64, positions_b: tl.int64,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, q_out_b: tl.int64, q_out_h: tl.int64, q_out_s: tl.int64,
    k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, k_out_b: tl.int64, k_out_h: tl.int64, k_out_s: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_s: tl.int64, v_out_b: tl.int64, v_out_h: tl.int64, v_out_s: tl.int64,
    D: tl.constexpr, PAIRS: tl.constexpr, AXES: tl.constexpr, EXPLICIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORMALIZE: tl.constexpr, NORMALIZE_V: tl.constexpr, UNIT: tl.constexpr,
    BS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Strides come in units of UNIT elements, 16 bytes where everything is aligned."""
    program = tl.program_id(0).to(tl.int64)
    group = program % groups
    batch = program // groups % B
    token = program // groups // B * BS + tl.arange(0, BS)
    ok = token < S
    cos, sin = 0.0, 0.0
    if PAIRS > 0:
        cos, sin = _cos_sin(
            positions_ptr, table_ptr, batch, token, ok, positions_b, frames, tokens_per_frame, width, start,
            EXPLICIT, AXES, PAIRS, BP,
        )  # fmt: skip
    for h in range(group, q_heads, groups):
        _forward_head(
            q_ptr, (batch * q_b + h * q_h + token * q_s) * UNIT,
            q_out_ptr, (batch * q_out_b + h * q_out_h + token * q_out_s) * UNIT,
            q_rms_ptr + batch * rms_b + h * S + token, ok, cos, sin, eps, D, NORMALIZE, PAIRS, BP, BR, INTERLEAVED, BS,
        )  # fmt: skip
    for h in range(group, k_heads, groups):
        _forward_head(
            k_ptr, (batch * k_b + h * k_h + token * k_s) * UNIT,
            k_out_ptr, (batch * k_out_b + h * k_out_h + token * k_out_s) * UNIT,
            k_rms_ptr + batch * rms_b + h * S + token, ok, cos, sin, eps, D, NORMALIZE, PAIRS, BP, BR, INTERLEAVED, BS,
        )  # fmt: skip
    for h in range(group, v_heads, groups):
        _forward_head(
            v_ptr, (batch * v_b + h * v_h + token * v_s) * UNIT,
            v_out_ptr, (batch * v_out_b + h * v_out_h + token * v_out_s) * UNIT,
            v_rms_ptr + batch * rms_b + h * S + token, ok, cos, sin, eps, D, NORMALIZE_V, 0, BP, BD, INTERLEAVED, BS,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES, *_BACKWARD_STRIDES])
def qk_prepare_bwd_kernel(
    q_grad_ptr, k_grad_ptr, v_grad_ptr, q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    q_rms_ptr, k_rms_ptr, v_rms_ptr, rms_b: tl.int64, positions_ptr, table_ptr, eps,
    B: tl.int64, S: tl.int64, groups: tl.int64, q_heads: tl.int64, k_heads: tl.int64, v_heads: tl.int64,
    frames: tl.int64, tokens_per_frame: tl.int64, width: tl.int64, start: tl.int64, positions_b: tl.int64,
    q_grad_b: tl.int64, q_grad_h: tl.int64, q_grad_s: tl.int64, q_b: tl.int64, q_h: tl.int64, q_s: tl.int64,
    q_out_b: tl.int64, q_out_h: tl.int64, q_out_s: tl.int64,
    k_grad_b: tl.int64, k_grad_h: tl.int64, k_grad_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64,
    k_out_b: tl.int64, k_out_h: tl.int64, k_out_s: tl.int64,
    v_grad_b: tl.int64, v_grad_h: tl.int64, v_grad_s: tl.int64, v_b: tl.int64, v_h: tl.int64, v_s: tl.int64,
    v_out_b: tl.int64, v_out_h: tl.int64, v_out_s: tl.int64,
    D: tl.constexpr, PAIRS: tl.constexpr, AXES: tl.constexpr, EXPLICIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORMALIZE: tl.constexpr, NORMALIZE_V: tl.constexpr, UNIT: tl.constexpr,
    BS: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """q, k, v are the outputs of forward, `out` the gradients of its inputs."""
    program = tl.program_id(0).to(tl.int64)
    group = program % groups
    batch = program // groups % B
    token = program // groups // B * BS + tl.arange(0, BS)
    ok = token < S
    cos, sin = 0.0, 0.0
    if PAIRS > 0:
        cos, sin = _cos_sin(
            positions_ptr, table_ptr, batch, token, ok, positions_b, frames, tokens_per_frame, width, start,
            EXPLICIT, AXES, PAIRS, BP,
        )  # fmt: skip
    for h in range(group, q_heads, groups):
        _backward_head(
            q_grad_ptr, (batch * q_grad_b + h * q_grad_h + token * q_grad_s) * UNIT,
            q_ptr, (batch * q_b + h * q_h + token * q_s) * UNIT,
            q_out_ptr, (batch * q_out_b + h * q_out_h + token * q_out_s) * UNIT,
            q_rms_ptr + batch * rms_b + h * S + token, ok, cos, sin, eps, D, NORMALIZE, PAIRS, BP, BR, INTERLEAVED, BS,
        )  # fmt: skip
    for h in range(group, k_heads, groups):
        _backward_head(
            k_grad_ptr, (batch * k_grad_b + h * k_grad_h + token * k_grad_s) * UNIT,
            k_ptr, (batch * k_b + h * k_h + token * k_s) * UNIT,
            k_out_ptr, (batch * k_out_b + h * k_out_h + token * k_out_s) * UNIT,
            k_rms_ptr + batch * rms_b + h * S + token, ok, cos, sin, eps, D, NORMALIZE, PAIRS, BP, BR, INTERLEAVED, BS,
        )  # fmt: skip
    for h in range(group, v_heads, groups):
        _backward_head(
            v_grad_ptr, (batch * v_grad_b + h * v_grad_h + token * v_grad_s) * UNIT,
            v_ptr, (batch * v_b + h * v_h + token * v_s) * UNIT,
            v_out_ptr, (batch * v_out_b + h * v_out_h + token * v_out_s) * UNIT,
            v_rms_ptr + batch * rms_b + h * S + token, ok, cos, sin, eps, D, NORMALIZE_V, 0, BP, BD, INTERLEAVED, BS,
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def turn_table(axes: tuple[int, ...], base: float, device: torch.device) -> torch.Tensor:
    """(2, pairs) int64: turns for one position of each pair, as a fraction of 2^64, and the pair's axis.

    base >= 1 keeps turns below 1 / (2 pi), hence below 2^63. Kept on the device: copied there once.
    """
    turns, axis_of = [], []
    for axis, channels in enumerate(axes):
        turns += [round(base ** (-j / channels) / (2 * math.pi) * 2**64) for j in range(0, channels, 2)]
        axis_of += [axis] * (channels // 2)
    return torch.tensor([turns, axis_of], dtype=torch.int64, device=device)


def _plan(
    kernel,
    operands: dict[str, Sequence[torch.Tensor]],
    rms: Sequence[torch.Tensor | None],
    positions: torch.Tensor | None,
    place: Sequence[int],
    axes: Sequence[int],
    base: float,
    interleaved: bool,
    eps: float,
) -> list[Launch]:
    """operands: {kind: (q, k, v or nothing)} with kinds "" (read), "grad_" and "out_"."""
    first = operands["out_"][0]
    B, _, S, D = first.shape
    pairs, rest = sum(axes) // 2, D - sum(axes)
    table = turn_table(tuple(axes), base, first.device) if pairs else first
    unit = 16 // first.element_size()
    strides = [s for group in operands.values() for t in group for s in t.stride()[:3]]
    aligned = not any(s % unit for s in strides) and not any(
        t.device.type != "meta" and t.data_ptr() % 16 for group in operands.values() for t in group
    )
    unit = unit if aligned else 1

    args: dict = {}
    for index, part in enumerate("qkv"):
        present = index < len(operands["out_"])
        for kind, group in operands.items():
            tensor = group[index] if present else first
            args[f"{part}_{kind}ptr"] = tensor
            for dim, letter in enumerate("bhs"):
                args[f"{part}_{kind}{letter}"] = tensor.stride(dim) // unit
        args[f"{part}_heads"] = operands["out_"][index].shape[1] if present else 0
        r = rms[index] if present else None
        args[f"{part}_rms_ptr"] = first if r is None else r
    some = next((r for r in rms if r is not None), None)
    args["rms_b"] = 0 if some is None else some.stride(0)
    args |= dict(zip(("frames", "tokens_per_frame", "width", "start"), place, strict=True))
    explicit = positions is not None
    args |= {"positions_ptr": positions if explicit else table, "table_ptr": table, "eps": eps, "B": B, "S": S}
    args["positions_b"] = positions.stride(0) if positions is not None and positions.shape[0] > 1 else 0
    groups = max(-(-args[f"{part}_heads"] // HEADS) for part in "qkv")
    tile = max(1, TILE // triton.next_power_of_2(D))
    args |= {
        "groups": groups, "D": D, "PAIRS": pairs, "AXES": len(axes), "EXPLICIT": explicit, "INTERLEAVED": interleaved,
        "NORMALIZE": rms[0] is not None, "NORMALIZE_V": len(rms) > 2 and rms[2] is not None, "UNIT": unit,
        "BS": tile, "BP": triton.next_power_of_2(max(1, pairs)), "BR": triton.next_power_of_2(max(1, rest)),
        "BD": triton.next_power_of_2(D),
    }  # fmt: skip
    return [Launch(kernel, (-(-S // tile) * B * groups,), args, num_warps=4, num_stages=1)]


def plan_forward(parts, outs, rms, positions, place, axes, base, interleaved, eps) -> list[Launch]:
    operands = {"": parts, "out_": outs}
    return _plan(qk_prepare_fwd_kernel, operands, rms, positions, place, axes, base, interleaved, eps)


def plan_backward(grads, outs, rms, grad_parts, positions, place, axes, base, interleaved, eps) -> list[Launch]:
    # A gradient may come with any strides, even expanded ones.
    grads = [g if g.stride(-1) == 1 or g.shape[-1] == 1 else g.contiguous() for g in grads]
    y = [g if out is None else out for g, out in zip(grads, outs, strict=True)]
    operands = {"grad_": grads, "": y, "out_": grad_parts}
    return _plan(qk_prepare_bwd_kernel, operands, rms, positions, place, axes, base, interleaved, eps)


def forward(
    parts: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    rms: Sequence[torch.Tensor | None],
    positions: torch.Tensor | None,
    place: Sequence[int],
    axes: Sequence[int],
    base: float,
    interleaved: bool,
    eps: float,
) -> None:
    """parts q, k and perhaps v (B, H, S, D) to `outs`, and the RMS of those whose `rms` (B, H, S) is not None."""
    parts = [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in parts]
    run(plan_forward(parts, outs, rms, positions, place, axes, base, interleaved, eps), parts[0].device)


def backward(
    grads: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor | None],
    rms: Sequence[torch.Tensor | None],
    grad_parts: Sequence[torch.Tensor],
    positions: torch.Tensor | None,
    place: Sequence[int],
    axes: Sequence[int],
    base: float,
    interleaved: bool,
    eps: float,
) -> None:
    """Gradients of the parts into `grad_parts`, from the outputs, so that the inputs need not be kept."""
    plan = plan_backward(grads, outs, rms, grad_parts, positions, place, axes, base, interleaved, eps)
    run(plan, grads[0].device)
