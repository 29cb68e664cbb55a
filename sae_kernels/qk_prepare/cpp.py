"""qk_prepare by the C++ extension on the CPU (csrc/steps.cpp): one pass over all parts each way; outputs are of ops.py.

Parts with a contiguous last dimension are read in place. Angles are formed in fp64, once for each frame, row and column
of a layout.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch


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
    found, normalized = _present(rms)
    turn = _turn(positions, place, axes, base, interleaved)
    parts = [_in_rows(part) for part in parts]
    torch.ops.sae_kernels_native.qk_prepare_fwd(parts, list(outs), found, normalized, *turn, interleaved, eps)


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
    found, normalized = _present(rms)
    turn = _turn(positions, place, axes, base, interleaved)
    grads = [_in_rows(grad) for grad in grads]
    ys = [_in_rows(y) for y, r in zip(outs, rms, strict=True) if y is not None and r is not None]
    torch.ops.sae_kernels_native.qk_prepare_bwd(grads, ys, found, list(grad_parts), normalized, *turn, interleaved, eps)


def _present(rms: Sequence[torch.Tensor | None]) -> tuple[list[torch.Tensor], int]:
    """Those that are there, and a bit mask of which."""
    return [r for r in rms if r is not None], sum(1 << i for i, r in enumerate(rms) if r is not None)


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _turn(
    positions: torch.Tensor | None, place: Sequence[int], axes: Sequence[int], base: float, interleaved: bool
) -> tuple[torch.Tensor | None, list[int], list[int], list[int]]:
    """(table, place, numbers of each axis, rows of each axis), as csrc/registration.cpp has them."""
    if sum(axes) == 0:
        return None, [], [], []
    channels = [w if interleaved else w // 2 for w in axes]
    if positions is None:
        frames, tokens_per_frame, width, start = place
        sizes = (frames, tokens_per_frame // width, width)[: len(axes)]
        table = _layout_table(sizes, start, tuple(axes), base, interleaved)
        return table, [frames, tokens_per_frame, width], channels, list(sizes)
    rows = torch.cat([_cos_sin(positions[..., i], w, base, interleaved) for i, w in enumerate(axes)], dim=-1)
    return rows.flatten(), [0, 1, 1], [sum(channels)], [rows.shape[0] * rows.shape[1]]


@functools.lru_cache(maxsize=64)
def _layout_table(
    sizes: tuple[int, ...], start: int, axes: tuple[int, ...], base: float, interleaved: bool
) -> torch.Tensor:
    """A network's layers and a sampler's steps ask for the same small table again and again."""
    at = [torch.arange(size) + (start if axis == 0 else 0) for axis, size in enumerate(sizes)]
    return torch.cat([_cos_sin(a, w, base, interleaved).flatten() for a, w in zip(at, axes, strict=True)])


def _cos_sin(at: torch.Tensor, channels: int, base: float, interleaved: bool) -> torch.Tensor:
    """(..., 2, pairs), fp32; where pairs are neighbours (..., 2, channels), sines signed for the other channel."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float64) / max(channels, 1)
    phase = at.to(torch.float64)[..., None] * torch.pow(base, -exponent)
    cos, sin = phase.cos(), phase.sin()
    if interleaved:
        cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    return torch.stack((cos, sin), dim=-2).to(torch.float32)
