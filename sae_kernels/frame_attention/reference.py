"""The specification of frame_attention: dense masked softmax attention, any float dtype, differentiable by autograd.

B batch, Hq and Hkv heads, S tokens, D head dim.
"""

from __future__ import annotations

import torch

from ..layout import FrameLayout


def frame_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: FrameLayout, scale: float, noisy_queries_only: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, Hq, Sq, D) and natural-log lse (B, Hq, Sq). Builds the S x S mask and scores."""
    mask = layout.dense_mask(q.device)
    if noisy_queries_only:
        mask = layout.split(mask, 0)[1]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~mask, float("-inf"))
    # hidden weights are 0 already; filled so that they get no gradient even if it is infinite
    out = scores.softmax(dim=-1).masked_fill(~mask, 0) @ v
    lse = scores.detach().to(torch.float64 if q.dtype == torch.float64 else torch.float32).logsumexp(dim=-1)
    return out, lse
