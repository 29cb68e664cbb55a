"""qk_prepare from library calls, forward and backward, on any device; outputs are given by ops.py.

Everything is computed in fp32 (fp64 for fp64), and rounded once; angles are formed in fp64 and small: one for each
token and pair, shared by all heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
    frames, tokens_per_frame, width, start = place
    tables = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / max(channels, 1)
        frequency = torch.pow(base, -exponent)
        if positions is not None:
            at = positions[:, None, :, axis]
        else:
            size = (frames, tokens_per_frame // width, width)[axis]
            at = torch.arange(size, device=device) + (start if axis == 0 else 0)
        phase = at.to(torch.float64)[..., None] * frequency
        cos_sin = torch.stack((phase.cos(), phase.sin())).to(dtype)
        if positions is None:
            # Sines are made for a frame, a row, a column; then repeated over (stream, frame, row, column).
            streams, height = length // (frames * tokens_per_frame), tokens_per_frame // width
            shape = [1, 1, 1, 1]
            shape[1 + axis] = size
            cos_sin = cos_sin.view(2, *shape, -1).expand(2, streams, frames, height, width, -1)
            cos_sin = cos_sin.reshape(2, length, -1)
        tables.append(cos_sin)
    cos, sin = (tables[0] if len(tables) == 1 else torch.cat(tables, dim=-1)).unbind(0)
    return cos, sin


def halves(x: torch.Tensor, pairs: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and of the second channel of each pair."""
    if interleaved:
        return x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    return x[..., :pairs], x[..., pairs : 2 * pairs]


def turn(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    sign: int,
    out: torch.Tensor,
) -> None:
    """out = R(sign p) x factor, with x in the compute dtype."""
    work = out if out.dtype == x.dtype else torch.empty_like(out, dtype=x.dtype)
    if cos_sin is None:
        if factor is None:
            out.copy_(x)
            return
        torch.mul(x, factor, out=work)
    else:
        cos, sin = cos_sin
        pairs = cos.shape[-1]
        x = x if factor is None else x * factor
        (a, b), (to_a, to_b) = halves(x, pairs, interleaved), halves(work, pairs, interleaved)
        torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=sign)
        if 2 * pairs < x.shape[-1]:
            work[..., 2 * pairs :] = x[..., 2 * pairs :]
    if work is not out:
        out.copy_(work)


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
    cos_sin = rotation(x.shape[2], positions, place, axes, base, dtype, x.device)
    for index, (x, out, r) in enumerate(zip(parts, outs, rms, strict=True)):
        factor = None
        if r is not None:
            norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype).mul_(x.shape[-1] ** -0.5)
            r.copy_(norm)
            factor = norm.add_(eps).reciprocal_()[..., None]
        turn(x.to(dtype), factor, cos_sin if index < 2 else None, interleaved, 1, out)


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
    cos_sin = rotation(grad.shape[2], positions, place, axes, base, dtype, grad.device)
    for index, (grad, y, r, grad_x) in enumerate(zip(grads, outs, rms, grad_parts, strict=True)):
        grad = grad.to(dtype)
        if r is not None and y is not None:
            y, r = y.to(dtype), r[..., None]
            # The norm has gradient zero at the origin, by autograd's convention.
            slope = ((grad * y).sum(-1, keepdim=True) / (-y.shape[-1] * r)).masked_fill_(r == 0, 0)
            grad = torch.mul(y, slope).addcmul_(grad, 1 / (r + eps))
        turn(grad, None, cos_sin if index < 2 else None, interleaved, -1, grad_x)
