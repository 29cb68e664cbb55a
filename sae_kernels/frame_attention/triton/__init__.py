"""frame_attention in Triton: forward, dK/dV and dQ kernels whose work list is arithmetic on the layout's integers.

A tile of rows is inside one stream and may cut through blocks anywhere. Its rows see at most four intervals of keys;
the part that every row sees is processed in full tiles without a mask, and only the rest is masked, by comparing token
indices with each row's bounds. dK/dV follows the same relation from the side of a tile of keys. Each gradient
element is summed by one program in one order: no atomics, bitwise repeatable, independent of the batch.

Tiles are read through pointers, or (TMA) through tensor descriptors by the copy engine: the same tiles in the same
order, hence the same bits. The masks of pointers leave out what no row of a tile sees. A descriptor reads all of a
tile; if that lets a NaN in, which shows in the result, the tile is computed again with care.

Token indices count from a stream's start. N tokens in a stream, U tokens in a block, W tokens in a window,
BM rows and BN keys in a tile, D head dim, BD its next power of two. Addresses are int64.
"""

import torch

from ..._launch import architecture, run
from ...layout import FrameLayout
from .plan import Gradients, plan_backward, plan_forward

__all__ = ["Gradients", "backward", "forward", "plan_backward", "plan_forward"]


def forward(q, k, v, out, lse, layout: FrameLayout, scale: float, noisy_queries_only: bool) -> None:
    """Fill out (like q) and lse (B, Hq, Sq)."""
    run(plan_forward(q, k, v, out, lse, layout, scale, noisy_queries_only, architecture(q.device)), q.device)


def backward(
    grad_out, q, k, v, out, lse, dq, dk, dv, layout: FrameLayout, scale: float, noisy_queries_only: bool
) -> None:
    """Fill dq, dk, dv; allocates one fp32 number for each row."""
    tensors = Gradients(grad_out, q, k, v, out, lse, torch.empty_like(lse), dq, dk, dv)
    run(plan_backward(tensors, layout, scale, noisy_queries_only, architecture(q.device)), q.device)
