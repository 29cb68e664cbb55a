"""The specification: every frame gathers its kt source frames, one at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..layout import FrameLayout


def causal_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    layout: FrameLayout,
    past_scale: torch.Tensor | None,
    last_scale: torch.Tensor | None,
    history: torch.Tensor | None,
    pad_value: float,
) -> torch.Tensor:
    """x (B, Cin, F, Y, X), weight (Cout, Cin, kt, ky, kx) -> (B, Cout, F, Y, X)."""
    kt, T = weight.shape[2], layout.frames
    clean = x[:, :, layout.clean_start : layout.clean_start + T]
    constant = torch.full_like(x[:, :, 0], pad_value)

    def source(stream: torch.Tensor, i: int, j: int) -> torch.Tensor:
        """Frame j as frame i of `stream` sees it."""
        if j < 0:
            return constant if history is None else history[:, :, kt - 1 + j]
        own = j >= i - i % layout.frames_per_block
        return stream[:, :, j] if own and stream is not clean else clean[:, :, j]

    frames = []
    for start in range(0, layout.total_frames, T):
        stream = clean if start == layout.clean_start else x[:, :, start : start + T]
        for i in range(T):
            y = _tap(stream[:, :, i], weight, kt - 1)
            if last_scale is not None:
                y = y * last_scale[:, start + i, None, None, None]
            if kt > 1:
                past = sum(_tap(source(stream, i, i - kt + 1 + tap), weight, tap) for tap in range(kt - 1))
                if past_scale is not None:
                    past = past * past_scale[:, start + i, None, None, None]
                y = y + past
            frames.append(y)
    return torch.stack(frames, 2)


def past_term(history: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """history (B, Cin, kt - 1, Y, X), weight (Cout, Cin, kt, ky, kx) -> (B, Cout, Y, X)."""
    zero = history.new_zeros(history.shape[0], weight.shape[0], *history.shape[3:])
    return sum((_tap(history[:, :, tap], weight, tap) for tap in range(weight.shape[2] - 1)), zero)


def _tap(frame: torch.Tensor, weight: torch.Tensor, tap: int) -> torch.Tensor:
    kernel = weight[:, :, tap]
    return F.conv2d(frame, kernel, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2))
