"""The specification of what attention does to queries and keys first, in plain PyTorch.

A head x of n channels becomes R(p) x / (eps + |x| / sqrt(n)), where R(p) turns pair j of its channels by the angle
p base^(-2 j / w) (Su et al. 2021), p being the token's position along the axis that pair j belongs to, j counted from
the axis' first pair, and w the axis' number of channels. Channels after the last axis are not turned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def layout_positions(
    length: int, frames: int, tokens_per_frame: int, width: int, start: int, axes: int, device: torch.device
) -> torch.Tensor:
    """(1, S, A): the frame, or (frame, row, column); a frame's clean and noisy copies have one position."""
    token = torch.arange(length, device=device)
    frame = start + token // tokens_per_frame % frames
    row, column = token % tokens_per_frame // width, token % tokens_per_frame % width
    return torch.stack((frame, row, column)[:axes], dim=-1)[None]


def angles(positions: torch.Tensor, axes: Sequence[int], base: float) -> torch.Tensor:
    """positions (B or 1, S, A) -> (B or 1, 1, S, pairs), fp64."""
    turned = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device) / max(channels, 1)
        turned.append(positions[..., axis, None].double() * base**-exponent)
    return torch.cat(turned, dim=-1)[:, None]


def prepare(
    x: torch.Tensor,
    positions: torch.Tensor | None,
    axes: Sequence[int],
    base: float,
    interleaved: bool,
    normalize: bool,
    eps: float,
) -> torch.Tensor:
    """x (B, H, S, D) -> the same shape; computed in fp32 (fp64 for fp64) and rounded once."""
    dtype, D = x.dtype, x.shape[-1]
    x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if normalize:
        x = x / (eps + torch.linalg.vector_norm(x, dim=-1, keepdim=True) / D**0.5)
    if positions is not None:
        phase = angles(positions, axes, base)
        cos, sin = phase.cos().to(x.dtype), phase.sin().to(x.dtype)
        turned, rest = x.split([sum(axes), D - sum(axes)], dim=-1)
        # A pair is two neighbours, or a channel of the first half and one of the second.
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
        pairs = (a * cos - b * sin, a * sin + b * cos)
        turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
        x = torch.cat((turned, rest), dim=-1)
    return x.to(dtype)
