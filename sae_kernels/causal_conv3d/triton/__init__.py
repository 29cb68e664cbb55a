"""The shared-past convolution in Triton: implicit GEMM over channels-last video, nothing padded, stacked or duplicated.

A tap's operand is the video itself, read at shifted pixels. A program owns a tile of pixels (of one or several clean
frames) and of output channels: it accumulates the past taps once, then every stream's last taps, and combines
`out = last_scale * last + past_scale * past` in fp32. The data gradient is the same kernel with the taps mirrored: past
taps act on S = sum over streams of past_scale * grad, formed in one pass, last taps on each stream's own gradient. The
weight gradient is one GEMM over pixels for each tap, past taps again on S, split over pixels into fp32 parts that are
summed in a fixed order. No atomics; nothing depends on the batch but the split of the weight gradient.

Boxes (sm_90 and newer): a tile is a box of frames x rows x columns, and a tap's operand that box, shifted, which the
copy engine fetches with zeros beyond the map and the clip; no address or mask per pixel. A row's sum is the same, in
the same order, with and without. Parts: on small maps of many channels a tap pass is summed in a fixed number of parts,
which one program adds up in turn, or which programs of their own sum where tiles are too few: the same numbers.

The frames before frame 0 are `history`, or one row of `pad_value` that is read with stride 0.
K reduced and N output channels of a GEMM, rows its pixels; strides count units of 16 bytes (or of 1 element).

A launch hands over its arguments by name. Each integer is a parameter of its own, not a field of a tuple: a parameter
can be declared int64, while an integer in a tuple has the type that holds its value, and a size would select a binary.
"""

from __future__ import annotations

import torch

from ..._launch import architecture, run
from ...layout import FrameLayout
from .plan import Work, channels_last, plan_backward, plan_forward, plan_past_term, plan_past_term_backward, work

__all__ = [
    "Work",
    "backward",
    "forward",
    "past_term",
    "past_term_backward",
    "plan_backward",
    "plan_forward",
    "plan_past_term",
    "plan_past_term_backward",
    "work",
]


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    past_scale: torch.Tensor | None,
    last_scale: torch.Tensor | None,
    history: torch.Tensor | None,
    pad_value: float,
    layout: FrameLayout,
    keep_past: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out (B, Cout, F, Y, X), past (B, Cout, T, Y, X) or None), channels_last_3d."""
    launches, out, past = plan_forward(
        x, weight, past_scale, last_scale, history, pad_value, layout, architecture(x.device), keep_past=keep_past
    )
    run(launches, x.device)
    return out, past


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    past_scale: torch.Tensor | None,
    last_scale: torch.Tensor | None,
    history: torch.Tensor | None,
    past: torch.Tensor | None,
    pad_value: float,
    layout: FrameLayout,
    mask: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (x, weight, past_scale, last_scale, history), None where `mask` does not ask.

    `past` is what `forward` returned, or None to have it computed again where past_scale's gradient needs it.
    """
    x, B = channels_last(x), x.shape[0]
    launches, grad_x, parts, past_dot, last_dot, grad_history = plan_backward(
        grad, x, weight, past_scale, last_scale, history, past, pad_value, layout, mask, architecture(x.device)
    )
    run(launches, x.device)
    grad_past_scale = None if past_dot is None else _sum_dots(past_dot, x)
    if mask[2] and weight.shape[2] == 1:
        grad_past_scale = x.new_zeros(B, x.shape[2])
    grad_last_scale = None if last_dot is None else _sum_dots(last_dot, x)
    return grad_x, _sum_parts(parts, weight), grad_past_scale, grad_last_scale, grad_history


def past_term(history: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """history (B, Cin, kt - 1, Y, X) -> (B, Cout, Y, X), channels_last."""
    launches, past = plan_past_term(history, weight, architecture(history.device))
    run(launches, history.device)
    return past.squeeze(2)


def past_term_backward(
    grad: torch.Tensor, history: torch.Tensor, weight: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of (history, weight), None where `mask` does not ask."""
    launches, grad_history, parts = plan_past_term_backward(
        grad.unsqueeze(2), history, weight, mask, architecture(history.device)
    )
    run(launches, history.device)
    return grad_history, _sum_parts(parts, weight)


def _sum_parts(parts: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor | None:
    """The weight's gradient from its parts, like the weight; last taps without a part are zero."""
    if not parts:
        return None
    kt, ky, kx = weight.shape[2:]
    sums = [part.sum(0) for part in parts]
    taps = torch.cat(sums, 1) if len(sums) > 1 else sums[0]
    if taps.shape[1] < kt * ky * kx:
        taps = torch.cat([taps, taps.new_zeros(taps.shape[0], ky * kx, taps.shape[2])], 1)
    return torch.empty_like(weight).copy_(taps.unflatten(1, (kt, ky, kx)).permute(0, 4, 1, 2, 3))


def _sum_dots(dot: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(tiles, B, F, pixels) fp32 -> (B, F) of the dtype of x."""
    return dot.sum((0, 3)).to(x.dtype)
