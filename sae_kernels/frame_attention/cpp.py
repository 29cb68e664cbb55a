"""frame_attention by the C++ extension on the CPU (csrc/frame_attention.cpp): one kernel forward, one backward."""

from __future__ import annotations

import torch

from ..layout import FrameLayout


def forward(q, k, v, out, lse, layout: FrameLayout, scale: float, noisy_queries_only: bool) -> None:
    """Fill out (like q) and lse (B, Hq, Sq)."""
    geometry = _geometry(layout)
    torch.ops.sae_kernels_native.frame_attention_fwd(q, k, v, out, lse, *geometry, scale, noisy_queries_only)


def backward(
    grad_out, q, k, v, out, lse, dq, dk, dv, layout: FrameLayout, scale: float, noisy_queries_only: bool
) -> None:
    """Fill dq, dk, dv."""
    tensors = (grad_out, q, k, v, out, lse, dq, dk, dv)
    torch.ops.sae_kernels_native.frame_attention_bwd(*tensors, *_geometry(layout), scale, noisy_queries_only)


def _geometry(layout: FrameLayout) -> tuple[int, int, int, bool, int, int]:
    """(tokens of a stream, tokens of a block, noisy copies, noisy first, window or -1, sink)"""
    tokens, block = layout.frames * layout.tokens_per_frame, layout.frames_per_block * layout.tokens_per_frame
    window = -1 if layout.window is None else layout.window
    return tokens, block, layout.noisy_copies, layout.noisy_first, window, layout.sink
