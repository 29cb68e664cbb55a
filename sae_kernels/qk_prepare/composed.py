"""qk_prepare from library calls, forward and backward, on any device; outputs are given by ops.py.

Everything is computed in fp32 (fp64 for fp64), and rounded once; angles are formed in fp64 and small: one for each
token and pair, shared by all heads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

# Elements of a part done at a time on the CPU, so that temporaries stay in a cache.
PIECE = 1 << 18


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotation(
    length: int,
    positions: torch.Tensor | None,
    place: Sequence[int],
    axes: Sequence[int],
    base: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(cos, sin), each broadcastable to (B, H, S, pairs); None where nothing is turned."""
    if sum(axes) == 0:
        return None
    if positions is not None:
        places = [positions[:, None, :, axis] for axis in range(len(axes))]
        cos, sin = torch.cat([cos_sin(at, w, base, dtype) for at, w in zip(places, axes, strict=True)], dim=-1)
        return cos, sin
    make = layout_rotation
    if device.type == "cpu" and length * sum(axes) <= PIECE:
        # A network's layers and a sampler's steps ask for the same small table again and again.
        make = cached_layout_rotation
    frames, tokens_per_frame, width, start = place
    cos, sin = make(length, (frames, tokens_per_frame, width, start), tuple(axes), base, dtype, device)
    return cos, sin


def layout_rotation(
    length: int,
    place: tuple[int, int, int, int],
    axes: tuple[int, ...],
    base: float,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """(2, S, pairs): made for a frame, a row, a column, then repeated over (stream, frame, row, column)."""
    frames, tokens_per_frame, width, start = place
    sizes = (frames, tokens_per_frame // width, width)
    tables = []
    for axis, channels in enumerate(axes):
        at = torch.arange(sizes[axis], device=device) + (start if axis == 0 else 0)
        shape = [1, 1, 1]
        shape[axis] = sizes[axis]
        table = cos_sin(at, channels, base, dtype).view(2, 1, *shape, -1)
        tables.append(table.expand(2, length // (frames * tokens_per_frame), *sizes, -1).reshape(2, length, -1))
    return tables[0] if len(tables) == 1 else torch.cat(tables, dim=-1)


cached_layout_rotation = functools.lru_cache(maxsize=16)(layout_rotation)


def cos_sin(at: torch.Tensor, channels: int, base: float, dtype: torch.dtype) -> torch.Tensor:
    """(2, *at.shape, channels / 2)"""
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=at.device) / max(channels, 1)
    phase = at.to(torch.float64)[..., None] * torch.pow(base, -exponent)
    return torch.stack((phase.cos(), phase.sin())).to(dtype)


def halves(x: torch.Tensor, pairs: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and of the second channel of each pair."""
    if interleaved:
        return x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    return x[..., :pairs], x[..., pairs : 2 * pairs]


def turn(
    x: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    sign: int,
    factor: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """out = factor R(sign p) x, with x in the compute dtype."""
    work = out if out.dtype == x.dtype else torch.empty_like(out, dtype=x.dtype)
    if angles is None:
        work.copy_(x) if factor is None else torch.mul(x, factor, out=work)
    else:
        cos, sin = angles
        pairs = cos.shape[-1]
        (a, b), (to_a, to_b) = halves(x, pairs, interleaved), halves(work, pairs, interleaved)
        torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=sign)
        if 2 * pairs < x.shape[-1]:
            work[..., 2 * pairs :] = x[..., 2 * pairs :]
        if factor is not None:
            work.mul_(factor)
    if work is not out:
        out.copy_(work)


def pieces(like: torch.Tensor) -> list[slice]:
    """Ranges of tokens."""
    B, H, S, D = like.shape
    step = S if like.device.type != "cpu" else max(1, PIECE // (B * H * D))
    return [slice(first, first + step) for first in range(0, S, step)]


def cut(x: torch.Tensor, tokens: slice, dim: int = 2) -> torch.Tensor:
    whole = tokens.start == 0 and tokens.stop >= x.shape[dim]
    return x if whole else x.narrow(dim, tokens.start, min(tokens.stop, x.shape[dim]) - tokens.start)


def angles_of(
    angles: tuple[torch.Tensor, torch.Tensor] | None, part: int, tokens: slice
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The angles of these tokens; none for part 2, which is v."""
    if angles is None or part == 2:
        return None
    cos, sin = angles
    return cut(cos, tokens, -2), cut(sin, tokens, -2)


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
    x = parts[0]
    dtype = compute_dtype(x.dtype)
    angles = rotation(x.shape[2], positions, place, axes, base, dtype, x.device)
    for index, (x, out, r) in enumerate(zip(parts, outs, rms, strict=True)):
        for tokens in pieces(x):
            some, factor = cut(x, tokens), None
            if r is not None:
                norm = torch.linalg.vector_norm(some, dim=-1, dtype=dtype, out=cut(r, tokens))
                factor = norm.mul_(x.shape[-1] ** -0.5).add(eps).reciprocal_()[..., None]
            turn(some.to(dtype), angles_of(angles, index, tokens), interleaved, 1, factor, cut(out, tokens))


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
    """grad_x = R(-p) (grad / (rms + eps) - y <grad, y> / (n rms)), from the output y: a rotation keeps products."""
    grad = grads[0]
    dtype = compute_dtype(grad.dtype)
    angles = rotation(grad.shape[2], positions, place, axes, base, dtype, grad.device)
    for index, (grad, y, r, grad_x) in enumerate(zip(grads, outs, rms, grad_parts, strict=True)):
        for tokens in pieces(grad):
            some = cut(grad, tokens).to(dtype)
            if r is not None and y is not None:
                out, scale = cut(y, tokens).to(dtype), cut(r, tokens)[..., None]
                # The norm has gradient zero at the origin, by autograd's convention.
                slope = ((some * out).sum(-1, keepdim=True) / (-y.shape[-1] * scale)).masked_fill_(scale == 0, 0)
                some = torch.mul(out, slope).addcmul_(some, 1 / (scale + eps))
            turn(some, angles_of(angles, index, tokens), interleaved, -1, None, cut(grad_x, tokens))
