"""causal_conv3d by the C++ extension on the CPU (csrc/causal_conv3d.cpp): one call forward, one backward.

Activations are read where they lie: nothing is concatenated, padded or stacked, and padding is not multiplied.
"""

from __future__ import annotations

import torch

from ..layout import FrameLayout


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
    """(out (B, Cout, F, Y, X), past (B, Cout, T, Y, X) or None if kt = 1 or not kept)."""
    x = _channels_innermost(x)
    history = None if history is None else _channels_innermost(history)
    B, _, F, Y, X = x.shape
    out = _video(x, (B, weight.shape[0], F, Y, X))
    keep_past = keep_past and weight.shape[2] > 1
    past = _video(x, (B, weight.shape[0], layout.frames, Y, X)) if keep_past else None
    scales = _contiguous(past_scale), _contiguous(last_scale)
    torch.ops.sae_kernels_native.causal_conv3d_fwd(
        x, weight.contiguous(), *scales, history, out, past, pad_value, *_geometry(layout)
    )
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
    need_x, need_weight, need_past_scale, need_last_scale, need_history = mask
    x, grad = _channels_innermost(x), _channels_innermost(grad)
    history = None if history is None else _channels_innermost(history)
    if need_past_scale and past is None:
        past = forward(x, weight, past_scale, last_scale, history, pad_value, layout)[1]
    grad_x = _video(x, x.shape) if need_x else None
    grad_weight = weight.new_empty(weight.shape) if need_weight else None
    grad_past_scale = x.new_zeros(x.shape[0], x.shape[2]) if need_past_scale else None
    grad_last_scale = x.new_empty(x.shape[0], x.shape[2]) if need_last_scale else None
    grad_history = _video(x, history.shape) if history is not None and need_history else None
    grads = (grad_x, grad_weight, grad_past_scale if past is not None else None, grad_last_scale, grad_history)
    scales = _contiguous(past_scale), _contiguous(last_scale)
    torch.ops.sae_kernels_native.causal_conv3d_bwd(
        grad, x, weight.contiguous(), *scales, history, past, *grads, pad_value, *_geometry(layout)
    )
    return grad_x, _like(grad_weight, weight), grad_past_scale, grad_last_scale, grad_history


def past_term(history: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """history (B, Cin, kt - 1, Y, X) -> (B, Cout, Y, X), channels_last."""
    history = _channels_innermost(history)
    past = _video(history, (history.shape[0], weight.shape[0], 1, *history.shape[3:]))
    torch.ops.sae_kernels_native.causal_conv3d_fwd(
        None, weight.contiguous(), None, None, history, None, past, 0.0, *_geometry(FrameLayout(1, 1))
    )
    return past[:, :, 0]


def past_term_backward(
    grad: torch.Tensor, history: torch.Tensor, weight: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of (history, weight), None where `mask` does not ask."""
    grad, history = _channels_innermost(grad.unsqueeze(2)), _channels_innermost(history)
    grad_history = _video(history, history.shape) if mask[0] else None
    grad_weight = weight.new_empty(weight.shape) if mask[1] else None
    torch.ops.sae_kernels_native.causal_conv3d_bwd(
        grad, None, weight.contiguous(), None, None, history, None, None, grad_weight, None, None, grad_history, 0.0,
        *_geometry(FrameLayout(1, 1)),
    )  # fmt: skip
    return grad_history, _like(grad_weight, weight)


def _geometry(layout: FrameLayout) -> tuple[int, int, bool]:
    return layout.frames, layout.noisy_copies, layout.noisy_first


def _video(like: torch.Tensor, shape) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last_3d)


def _channels_innermost(video: torch.Tensor) -> torch.Tensor:
    """The video itself if each pixel's channels lie in one piece of memory, else a copy."""
    if video.stride(1) == 1 or video.shape[1] == 1:
        return video
    return video.contiguous(memory_format=torch.channels_last_3d)


def _contiguous(scale: torch.Tensor | None) -> torch.Tensor | None:
    return None if scale is None else scale.contiguous()


def _like(grad: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """In the memory order that was promised: that of the weight."""
    if grad is None or weight.is_contiguous():
        return grad
    return torch.empty_like(weight).copy_(grad)
