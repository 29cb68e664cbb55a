"""frame_attention from library calls on the layout's intervals: nothing of size S x S, forward or backward.

Rows are taken in groups of consecutive blocks, all streams together, because clean block i and noisy block i see the
same past. For each group the past that every row sees is one or two unmasked calls; what only some rows see (the
group's own blocks, and the edge of a window) is one call with a small mask. The parts are joined by their lse.

The backward pass uses that softmax probabilities are exp(scores - lse) with the lse of the whole row, so a flash
backward call given the whole row's out and lse yields exactly one part's share of each gradient.

B batch, G query heads per key head, R streams whose rows are asked for, n tokens of a group in one stream, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..layout import FrameLayout

# Blocks are grouped until they hold this many tokens per stream; with fewer, a call costs more than its arithmetic.
GROUP_TOKENS = 128


@dataclass(frozen=True)
class Group:
    """Rows [start, end) of every stream, and the clean tokens they see, in tokens counted from a stream's start."""

    start: int
    end: int
    full: tuple[tuple[int, int], ...]  # seen by every row
    partial: tuple[int, int]  # past the window for some rows
    blocks: int


def plan(layout: FrameLayout) -> list[Group]:
    """Split the sequence into groups; integer arithmetic only."""
    unit = layout.frames_per_block * layout.tokens_per_frame
    stream = layout.frames * layout.tokens_per_frame
    step = max(1, GROUP_TOKENS // unit)
    groups = []
    for first in range(0, layout.num_blocks, step):
        last = min(first + step, layout.num_blocks) - 1
        full: list[tuple[int, int]] = [(0, first)]
        partial = (first, first)
        if layout.window is not None:
            # Block i sees [0, sink) and [i - window, i): every row of the group sees both of these.
            sink = min(layout.sink, first)
            recent = min(max(last - layout.window, sink), first)
            full = [(0, sink), (recent, first)] if recent > sink else [(0, first)]
            partial = (min(max(first - layout.window, sink), recent), recent)
        groups.append(
            Group(
                start=first * unit,
                end=min((last + 1) * unit, stream),
                full=tuple((a * unit, b * unit) for a, b in full if b > a),
                partial=(partial[0] * unit, partial[1] * unit),
                blocks=last + 1 - first,
            )
        )
    return groups


def edge_mask(group: Group, layout: FrameLayout, like: torch.Tensor) -> torch.Tensor | None:
    """Additive mask (n, m) over the keys [partial window | clean blocks of the group | own stream's blocks]."""
    if group.blocks == 1:
        return None
    unit = layout.frames_per_block * layout.tokens_per_frame
    index = torch.arange(group.start, group.end, device=like.device) // unit
    old = torch.arange(*group.partial, device=like.device) // unit
    row = index[:, None]
    past = index[None] < row
    if layout.window is not None:
        past &= (index[None] >= row - layout.window) | (index[None] < layout.sink)
        partial = old[None] >= row - layout.window
    else:
        partial = old[None] < row
    visible = torch.cat([partial, past, index[None] == row], dim=1)
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, float("-inf"))


class Streams:
    """q, k, v and tensors of their shapes, viewed as (B, Hkv, G, stream, token, D) without copies."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, layout: FrameLayout, noisy_queries_only: bool) -> None:
        self.layout = layout
        self.kv_heads = k.shape[1]
        self.query_groups = q.shape[1] // k.shape[1]
        self.stream_tokens = layout.frames * layout.tokens_per_frame
        order = list(range(layout.streams))
        # Streams in order clean, noisy 1..K, by their place in memory.
        memory = [order[-1], *order[:-1]] if layout.noisy_first else order
        self.clean = memory[0]
        self.query_memory = [*range(layout.noisy_copies)] if noisy_queries_only else memory
        self.key_memory = memory[1:] if noisy_queries_only else memory

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Hq, Sq, ...) -> (B, Hkv, G, R, stream tokens, ...)"""
        return x.unflatten(2, (-1, self.stream_tokens)).unflatten(1, (self.kv_heads, self.query_groups))

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Hkv, S, D) -> (B, Hkv, streams, stream tokens, D)"""
        return x.unflatten(2, (-1, self.stream_tokens))

    def group_rows(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """(B, Hq, Sq, ...) -> (B, Hkv, R, G, n, ...), streams in the order of `query_memory`."""
        x = self.queries(x)[:, :, :, self.query_memory, group.start : group.end]
        return x.transpose(2, 3).contiguous()

    def edge_keys(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """(B, Hkv, S, D) -> (B, Hkv, R, m, D): for each stream the keys of `edge_mask`."""
        x = self.keys(x)
        own = x[:, :, self.key_memory, group.start : group.end]
        if group.blocks == 1:
            return own
        clean = torch.cat([x[:, :, self.clean, slice(*group.partial)], x[:, :, self.clean, group.start : group.end]], 2)
        return torch.cat([clean[:, :, None].expand(-1, -1, len(self.key_memory), -1, -1), own], dim=3)

    def add_edge_grad(self, grad: torch.Tensor, part: torch.Tensor, group: Group) -> None:
        """Add the gradient of `edge_keys` to that of the keys: shared clean keys sum over all streams."""
        grad = self.keys(grad)
        n = group.end - group.start
        shared = part[..., :-n, :]
        for index, stream in enumerate(self.key_memory):
            grad[:, :, stream, group.start : group.end] += part[:, :, index, -n:]
        if group.blocks > 1:
            shared = shared.sum(dim=2)
            old = group.partial[1] - group.partial[0]
            grad[:, :, self.clean, slice(*group.partial)] += shared[:, :, :old]
            grad[:, :, self.clean, group.start : group.end] += shared[:, :, old:]


def forward(q, k, v, out, lse, layout: FrameLayout, scale: float, noisy_queries_only: bool) -> None:
    """Fill out (like q) and lse (B, Hq, Sq)."""
    streams = Streams(q, k, layout, noisy_queries_only)
    clean_k, clean_v = streams.keys(k)[:, :, streams.clean], streams.keys(v)[:, :, streams.clean]
    out_view, lse_view = streams.queries(out), streams.queries(lse)
    for group in plan(layout):
        rows = streams.group_rows(q, group)  # [B, Hkv, R, G, n, D]
        edge_k, edge_v = streams.edge_keys(k, group), streams.edge_keys(v, group)
        mask = edge_mask(group, layout, q)
        if mask is not None:
            mask = mask.repeat(streams.query_groups, 1)
        part_out, part_lse = _attend_apart(
            rows.flatten(3, 4).flatten(1, 2), edge_k.flatten(1, 2), edge_v.flatten(1, 2), mask, scale
        )
        parts = [(part_out.reshape(rows.shape), part_lse.reshape(rows.shape[:-1]))]
        for a, b in group.full:
            part_out, part_lse = _attend(rows.flatten(2, 4), clean_k[:, :, a:b], clean_v[:, :, a:b], None, scale)
            parts.append((part_out.reshape(rows.shape), part_lse.reshape(rows.shape[:-1])))
        merged, merged_lse = _merge(parts)
        for index, stream in enumerate(streams.query_memory):
            out_view[:, :, :, stream, group.start : group.end] = merged[:, :, index]
            lse_view[:, :, :, stream, group.start : group.end] = merged_lse[:, :, index]


def backward(
    grad_out, q, k, v, out, lse, dq, dk, dv, layout: FrameLayout, scale: float, noisy_queries_only: bool
) -> None:
    """Fill dq, dk, dv. Sums over parts are kept in fp32 (fp64 for fp64)."""
    streams = Streams(q, k, layout, noisy_queries_only)
    clean_k, clean_v = streams.keys(k)[:, :, streams.clean], streams.keys(v)[:, :, streams.clean]
    wide = lse.dtype
    dk_sum, dv_sum = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    dk_clean, dv_clean = streams.keys(dk_sum)[:, :, streams.clean], streams.keys(dv_sum)[:, :, streams.clean]
    dq_view = streams.queries(dq)
    for group in plan(layout):
        rows, grads, outs = (streams.group_rows(x, group) for x in (q, grad_out, out))  # [B, Hkv, R, G, n, D]
        row_lse = streams.group_rows(lse, group)
        edge_k, edge_v = streams.edge_keys(k, group), streams.edge_keys(v, group)
        mask = edge_mask(group, layout, q)
        if mask is not None:
            mask = mask.repeat(streams.query_groups, 1)
        edge = [x.flatten(3, 4).flatten(1, 2) for x in (grads, rows, outs, row_lse)]
        dq_part, dk_part, dv_part = _attend_backward_apart(
            edge, edge_k.flatten(1, 2), edge_v.flatten(1, 2), mask, scale
        )
        streams.add_edge_grad(dk_sum, dk_part.reshape(edge_k.shape), group)
        streams.add_edge_grad(dv_sum, dv_part.reshape(edge_v.shape), group)
        dq_rows = dq_part.reshape(rows.shape).to(wide)
        every = [x.flatten(2, 4) for x in (grads, rows, outs, row_lse)]
        for a, b in group.full:
            dq_part, dk_part, dv_part = _attend_backward(every, clean_k[:, :, a:b], clean_v[:, :, a:b], None, scale)
            dk_clean[:, :, a:b] += dk_part
            dv_clean[:, :, a:b] += dv_part
            dq_rows += dq_part.reshape(rows.shape)
        for index, stream in enumerate(streams.query_memory):
            dq_view[:, :, :, stream, group.start : group.end] = dq_rows[:, :, index]
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)


def _merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Join softmax parts over disjoint keys: lse = log sum exp(lse_p), out = sum exp(lse_p - lse) out_p."""
    if len(parts) == 1:
        return parts[0]
    stacked = torch.stack([lse for _, lse in parts])
    lse = stacked.logsumexp(dim=0)
    weights = (stacked - lse).exp_().unsqueeze(-1)
    out = weights[0] * parts[0][0]
    for weight, (part, _) in zip(weights[1:], parts[1:], strict=True):
        out.addcmul_(weight, part.to(out.dtype))
    return out, lse


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _flash_cpu(q: torch.Tensor) -> bool:
    return q.device.type == "cpu"


def _attend(q, k, v, mask, scale):
    """Softmax attention with lse: q (B, H, n, D), k, v (B, H, m, D), additive mask (n, m) or None."""
    if _flash_cpu(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q, k.transpose(-2, -1)).to(_wide(q)).mul_(scale)
    if mask is not None:
        scores.masked_fill_(mask != 0, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return torch.matmul(scores.sub_(lse.unsqueeze(-1)).exp_().to(v.dtype), v), lse


def _attend_backward(rows, k, v, mask, scale):
    """(dq, dk, dv) of one part; rows: (grad_out, q, out, lse) of the whole rows."""
    grad_out, q, out, lse = rows
    if _flash_cpu(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )
    scores = torch.matmul(q, k.transpose(-2, -1)).to(_wide(q)).mul_(scale)
    if mask is not None:
        scores.masked_fill_(mask != 0, -torch.inf)
    p = scores.sub_(lse.unsqueeze(-1)).exp_()
    dv = torch.matmul(p.to(v.dtype).transpose(-2, -1), grad_out)
    delta = (grad_out.to(p.dtype) * out).sum(dim=-1, keepdim=True)
    ds = (p * (torch.matmul(grad_out, v.transpose(-2, -1)) - delta)).mul_(scale)
    if mask is not None:
        ds.masked_fill_(mask != 0, 0)  # 0 * inf where a product of hidden values overflows
    ds = ds.to(q.dtype)
    return torch.matmul(ds, k), torch.matmul(ds.transpose(-2, -1), q), dv


# In a call with a mask, what the mask hides must have no effect: not as 0 * nan, nor as inf - inf where a product of
# finite numbers overflows. The library adds the mask to the scores. On the CPU, where checking a result is cheap, rows
# that are not finite are computed again with zeros for what is hidden from them, which leaves the bits of all others.
# Elsewhere `_attend` overwrites scores, and what is not finite is removed beforehand.


def _attend_apart(q, k, v, mask, scale):
    """`_attend` in which what the mask hides has no effect."""
    if mask is None:
        return _attend(q, k, v, mask, scale)
    if _flash_cpu(q):
        out, lse = _attend(q, k, v, mask, scale)
        if not bool(out.sum().isfinite()) or not bool(lse.sum().isfinite()):
            for rows, hidden in _not_finite_lines(mask, out, lse.unsqueeze(-1)):
                seen_k, seen_v = (x.masked_fill(hidden.unsqueeze(-1), 0) for x in (k, v))
                again, again_lse = _attend(q, seen_k, seen_v, mask, scale)
                out[:, :, rows], lse[:, :, rows] = again[:, :, rows], again_lse[:, :, rows]
        return out, lse
    bad = _not_finite(v)
    out, lse = _attend(q, k, v.masked_fill(bad.unsqueeze(-1), 0), mask, scale)
    spoiled = (bad.unsqueeze(-2) & (mask == 0)).any(dim=-1)
    return out.masked_fill(spoiled.unsqueeze(-1), torch.nan), lse


def _attend_backward_apart(rows, k, v, mask, scale):
    """`_attend_backward` in which what the mask hides has no effect."""
    if mask is None:
        return _attend_backward(rows, k, v, mask, scale)
    grad_out, q, out, lse = rows
    if _flash_cpu(q):
        results = dq, dk, dv = _attend_backward(rows, k, v, mask, scale)
        if not all(bool(x.sum().isfinite()) for x in results):
            for lines, hidden in _not_finite_lines(mask, dq):
                seen_k, seen_v = (x.masked_fill(hidden.unsqueeze(-1), 0) for x in (k, v))
                dq[:, :, lines] = _attend_backward(rows, seen_k, seen_v, mask, scale)[0][:, :, lines]
            for lines, hidden in _not_finite_lines(mask.mT, dk, dv):
                seen = [x.masked_fill(hidden.unsqueeze(-1), 0) for x in (grad_out, q, out)]
                _, again_k, again_v = _attend_backward([*seen, lse.masked_fill(hidden, 0)], k, v, mask, scale)
                dk[:, :, lines], dv[:, :, lines] = again_k[:, :, lines], again_v[:, :, lines]
        return results
    bad_rows, bad_keys = _not_finite(grad_out, q, out, lse.unsqueeze(-1)), _not_finite(k, v)
    rows = [x.masked_fill(bad_rows.unsqueeze(-1), 0) for x in (grad_out, q, out)] + [lse.masked_fill(bad_rows, 0)]
    k, v = (x.masked_fill(bad_keys.unsqueeze(-1), 0) for x in (k, v))
    dq, dk, dv = _attend_backward(rows, k, v, mask, scale)
    visible = mask == 0
    spoiled_rows = bad_rows | (bad_keys.unsqueeze(-2) & visible).any(dim=-1)
    spoiled_keys = bad_keys | (bad_rows.unsqueeze(-1) & visible).any(dim=-2)
    fills = (spoiled_rows, spoiled_keys, spoiled_keys)
    return [x.masked_fill(fill.unsqueeze(-1), torch.nan) for x, fill in zip((dq, dk, dv), fills, strict=True)]


def _not_finite(*tensors: torch.Tensor) -> torch.Tensor:
    """(B, H, n): whether any of the tensors (B, H, n, D) holds an infinity or a NaN there."""
    return ~torch.stack([x.isfinite().all(dim=-1) for x in tensors]).all(dim=0)


def _not_finite_lines(mask: torch.Tensor, *results: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows (n) of mask (n, m) that hide the same keys (m), where a result (B, H, n, D) is not finite; those keys."""
    kinds, kind = (mask != 0).unique(dim=0, return_inverse=True)
    bad = _not_finite(*results).flatten(0, 1).any(dim=0)
    for index in kind[bad].unique():
        yield kind == index, kinds[index]
