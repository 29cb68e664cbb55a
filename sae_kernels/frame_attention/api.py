"""frame_attention: argument checks and choice of implementation."""

from __future__ import annotations

import torch

from .. import _checks
from ..layout import FrameLayout
from . import ops, reference


def frame_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: FrameLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    noisy_queries_only: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention where clean frames see clean frames up to themselves, and a noisy frame sees the clean past and itself.

    Equal to `F.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask(), scale=scale, enable_gqa=True)`
    without building a mask, a block list or an S x S tensor (except for `impl="reference"`). Deterministic. Tokens that
    a row does not see change no bit of its results, forward or backward, as long as they are finite.

    Args:
        q: (B, Hq, S, D), or (B, Hq, K*T*P, D) with `noisy_queries_only`. Any strides: those with a contiguous last
            dimension, such as of a transposed (B, S, H, D) tensor, cost no copy.
        k, v: (B, Hkv, S, D) of the dtype and device of q; Hkv divides Hq (grouped-query attention).
        layout: the geometry; S must equal `layout.sequence_length`.
        scale: factor on q k^T, 1/sqrt(D) by default. It must be a number; multiply q by a learned one.
        return_lse: also return the natural-log sum of exponentials of each row, (B, Hq, Sq), fp32 (fp64 for fp64
            input), without gradient.
        noisy_queries_only: q holds only the noisy rows, as the last attention of a network needs.
        impl: "auto", "reference" (dense, any float dtype), "composed" (library calls), "cpp" (on the CPU; not for
            float64), "triton". A named one is used or refused, never replaced.

    Returns:
        out, of the shape and dtype of q, and in its memory order if its last dimension is contiguous; with
        `return_lse` the pair (out, lse).

    Raises:
        ValueError: a shape, device or value breaks its rule, or `impl` cannot run here.
        TypeError: not a tensor, or not a supported or matching dtype.
    """
    _checks.check_flag("noisy_queries_only", noisy_queries_only)
    _check(q, k, v, layout, noisy_queries_only)
    available, why_not = ops.implementations(q.device, q.dtype, q.shape[-1])
    chosen = _checks.choose_implementation("frame_attention", impl, q.device, available, why_not)
    scale = q.shape[-1] ** -0.5 if scale is None else _checks.check_number("scale", scale)
    if chosen == "reference":
        out, lse = reference.frame_attention(q, k, v, layout, scale, noisy_queries_only)
    else:
        out, lse = ops.frame_attention_fwd(
            q,
            k,
            v,
            layout.frames,
            layout.tokens_per_frame,
            layout.frames_per_block,
            layout.noisy_copies,
            layout.noisy_first,
            layout.window,
            layout.sink,
            scale,
            noisy_queries_only,
            chosen,
        )
    return (out, lse) if return_lse else out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: FrameLayout, noisy_queries_only: bool) -> None:
    if not isinstance(layout, FrameLayout):
        raise TypeError(f"layout: must be a FrameLayout, got {_checks.describe(layout)}")
    _checks.check_tensor("q", q, shape="(B, Hq, S, D)")
    _checks.check_tensor("k", k, shape="(B, Hkv, S, D)")
    _checks.check_tensor("v", v, shape="(B, Hkv, S, D)")
    _checks.check_float("q", q)
    for name, tensor in (("k", k), ("v", v)):
        _checks.check_like(name, tensor, "q", q)
        _checks.check_size(name, "batch", tensor.shape[0], "batch of q", q.shape[0])
        _checks.check_size(name, "head dim", tensor.shape[3], "head dim of q", q.shape[3])
        _checks.check_size(name, "length", tensor.shape[2], "layout.sequence_length", layout.sequence_length)
    _checks.check_size("v", "heads", v.shape[1], "heads of k", k.shape[1])
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q: heads must be a multiple of the heads of k = {k.shape[1]}, got {q.shape[1]}")
    if q.shape[3] < 1:
        raise ValueError(f"q: head dim must be >= 1, got {q.shape[3]}")
    if noisy_queries_only:
        noisy = layout.sequence_length - layout.frames * layout.tokens_per_frame
        _checks.check_size("q", "length", q.shape[2], "noisy tokens of the layout", noisy)
    else:
        _checks.check_size("q", "length", q.shape[2], "layout.sequence_length", layout.sequence_length)
