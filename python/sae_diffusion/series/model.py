"""A small transformer that denoises series whose tokens have different noise levels."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..diffusion.schedules import scales_of
from ..diffusion.solvers import to_x0
from .config import SeriesModelConfig


class _Block(nn.Module):
    """Pre-norm attention over all tokens with a learned bias for each pair of positions, then a feed-forward layer."""

    def __init__(self, width: int, heads: int, expansion: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.bias = nn.Parameter(_neighbours(heads, length))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        B, N, D = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.to(q.dtype))
        h = h + self.out(mixed.transpose(1, 2).reshape(B, N, D))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class SeriesDenoiser(nn.Module):
    """denoise(x (B, N, C), log_snr (B, N)) -> estimate of the clean series (B, N, C), in normalised units.

    Each token's embedding is a function of (x, its noise features) plus a learned vector for its position; attention
    has no causal mask. `scaling` turns log-SNR into (signal, noise), see `sae_diffusion.diffusion.schedules`.
    """

    def __init__(self, config: SeriesModelConfig, length: int, channels: int = 1, scaling: str = "vp") -> None:
        super().__init__()
        if length < 1 or channels < 1:
            raise ValueError(f"length, channels: must be at least 1, got {length} and {channels}")
        self.config, self.length, self.channels, self.scaling = config, length, channels, scaling
        self.frequencies = 8
        noise_features = 2 if config.features == "scales" else 2 * self.frequencies + 3
        # a chain's law is not linear in x: hidden units before the first attention save a layer, and avoid a plateau
        first = nn.Linear(channels + noise_features, 2 * config.width)
        self.embed = nn.Sequential(first, nn.GELU(), nn.Linear(2 * config.width, config.width))
        with torch.no_grad():
            first.weight[:, :channels] *= 3
            first.bias.uniform_(-2, 2)
        self.position = nn.Parameter(_sinusoids(length, config.width))
        self.blocks = nn.ModuleList(
            _Block(config.width, config.heads, config.expansion, length) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def predict(self, x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """The network's own output: x0, eps or v of the shape of x, as configured.

        Raises:
            ValueError: x is not (B, length, channels), or log_snr not (B, length).
        """
        if x.ndim != 3 or x.shape[1:] != (self.length, self.channels):
            raise ValueError(f"x: must have shape (B, {self.length}, {self.channels}), got {tuple(x.shape)}")
        if log_snr.shape != x.shape[:2]:
            raise ValueError(f"log_snr: must have shape {tuple(x.shape[:2])}, got {tuple(log_snr.shape)}")
        signal, noise = (s.to(x.dtype).unsqueeze(-1) for s in scales_of(log_snr, self.scaling))
        # "ve" noise is unbounded; with this the network sees unit variance for unit-variance data in any scaling
        unit = torch.rsqrt(signal * signal + noise * noise)
        parts = [x * unit, signal * unit, noise * unit]
        if self.config.features == "log_snr":
            level = log_snr.to(x.dtype).unsqueeze(-1)
            octaves = torch.arange(self.frequencies, dtype=x.dtype, device=x.device)
            angle = level * (math.pi / 32) * 2 ** (octaves / 1.5)
            parts += [level / 8, angle.sin(), angle.cos()]
        h = self.embed(torch.cat(parts, dim=-1)) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))

    def forward(self, x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        signal, noise = (s.to(x.dtype).unsqueeze(-1) for s in scales_of(log_snr, self.scaling))
        return to_x0(self.predict(x, log_snr), x, signal, noise, self.config.prediction)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def _neighbours(heads: int, length: int) -> torch.Tensor:
    """Start of the pair bias, (heads, length, length): head h looks around offset -1, 1, -2, 2, ...

    Heads that look everywhere equally hardly notice a quadratic law between neighbours: from such a start the loss of
    the logistic map did not fall for more than 600 steps; from this one it fell within 200.
    """
    place = torch.arange(length, dtype=torch.float32)
    offset = torch.tensor([(1 + h // 2) * (1 if h % 2 else -1) for h in range(heads)], dtype=torch.float32)
    return -(place - place[:, None] - offset[:, None, None]).abs().clamp(max=3)


def _sinusoids(length: int, width: int) -> torch.Tensor:
    """Start of the position table, (length, width): wavelengths from 2 to 2000 positions."""
    rates = math.pi * 1000.0 ** (-torch.arange(width // 2) / (width // 2))
    angle = torch.arange(length)[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], dim=1)
