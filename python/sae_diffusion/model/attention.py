"""Self-attention over the visible frames, or within each frame."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_kernels import FrameLayout, frame_attention, qkv_prepare
from sae_kernels._deprecated import renamed_members

from .config import ModelConfig
from .frame_pass import ROTARY_BASE, FramePass
from .layers import Linear


class Attention(nn.Module):
    """Multi-head attention of unit-RMS queries, keys and values; heads of C // heads channels."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads(channels)
        self.impl = config.impl
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor, frames: FramePass) -> Tensor:
        """x (B, C, F, Y, X) -> the same shape."""
        B, C, n, Y, X = x.shape
        tokens = x.permute(0, 2, 3, 4, 1)
        # [B, F, P, 3 H, D]
        qkv = self.qkv(tokens).reshape(B, n, Y * X, 3 * self.heads, C // self.heads)
        out = self.attend(qkv, frames)
        return self.proj(out.reshape(B, n, Y, X, C)).permute(0, 4, 1, 2, 3)

    def attend(self, qkv: Tensor, frames: FramePass) -> Tensor:
        """qkv (B, F, P, 3 H, D) -> out whose elements are in the order (B, F, P, H, D)."""
        raise NotImplementedError


class SpatialAttention(Attention):
    """Every token sees every token of its own frame."""

    def attend(self, qkv: Tensor, frames: FramePass) -> Tensor:
        q, k, v = qkv_prepare(qkv.flatten(0, 1), normalize_v=True, impl=self.impl)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class TemporalAttention(SpatialAttention):
    """Every token sees every token of the visible frames, with rotary embedding of the absolute frame position.

    All tokens of a frame have the same phase; a frame's clean and noisy copies share it. The xPos decay of the
    reference model is left out on purpose: it multiplies keys by a power of the position, which overflows as the video
    grows (fp16 after about 1000 frames) unless it is recentred, and that would change cached keys with every frame.
    Rotated keys depend on their own position only, so they are cached once; a window limits how far back attention
    reaches.
    """

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__(channels, config)
        self.key = ""

    def attend(self, qkv: Tensor, frames: FramePass) -> Tensor:
        if frames.mode == "spatial":
            return super().attend(qkv, frames)
        P = qkv.shape[2]
        layout = frames.layout(P)
        q, k, v = qkv_prepare(
            qkv.flatten(1, 2), layout, start=frames.start, base=ROTARY_BASE, normalize_v=True, impl=self.impl
        )
        if frames.mode == "sequence":
            return self._whole(q, k, v, layout).transpose(1, 2)
        cache = frames.cache
        entry = cache.attention(self.key, k, P)
        if frames.mode == "denoise":
            out = F.scaled_dot_product_attention(q, *entry.with_own(cache.blocks, k, v))
        elif frames.mode == "flight":
            blocks = enumerate(q.split(entry.block_tokens, dim=2))
            seen = ((q_i, *entry.in_flight(cache.blocks, i, k, v)) for i, q_i in blocks)
            out = torch.cat([F.scaled_dot_product_attention(*qkv_i) for qkv_i in seen], dim=2)
        elif cache.blocks == 0:
            out = self._whole(q, k, v, layout)
            entry.append(0, k, v)
        else:
            chunks = []
            size = entry.block_tokens
            for i in range(frames.frames // frames.config.frames_per_block):
                q_i, k_i, v_i = (t[:, :, i * size : (i + 1) * size] for t in (q, k, v))
                chunks.append(F.scaled_dot_product_attention(q_i, *entry.with_own(cache.blocks + i, k_i, v_i)))
                entry.append(cache.blocks + i, k_i, v_i)
            out = torch.cat(chunks, dim=2)
        return out.transpose(1, 2)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout) -> Tensor:
        return cast(Tensor, frame_attention(q, k, v, layout, impl=self.impl))


__getattr__ = renamed_members(__name__, {"FrameAttention": SpatialAttention, "VideoAttention": TemporalAttention})
