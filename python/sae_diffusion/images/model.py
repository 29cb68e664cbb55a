"""A small U-Net that sees the noise level of every component.

Legend: B batch, C colours, Y X pixels, G groups of components, W model channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.schedules import scales_of
from .components import Whitened
from .config import NetConfig

TOKEN_FEATURES = 3


class NoiseState(nn.Module):
    """log-SNR of every component (B, C, Y, X) -> tokens (B, G, token_channels), one for each group of components.

    The features of a component are signal^2, tanh(log-SNR / 4) and log-SNR / 16 clipped to [-1, 1]; each group has its
    own linear map of the features of all its components, so that no level is lost in a mean.
    """

    index: Tensor

    def __init__(self, order: Tensor, groups: int, width: int) -> None:
        super().__init__()
        size = order.numel()
        groups = min(groups, size)
        self.per_group = -(-size // groups)
        groups = -(-size // self.per_group)
        # the last group repeats the last component if the size is not a multiple
        index = order.flatten().argsort(stable=True)
        pad = index[-1:].expand(groups * self.per_group - size)
        self.register_buffer("index", torch.cat([index, pad]), persistent=False)
        fan_in = self.per_group * TOKEN_FEATURES
        self.weight = nn.Parameter(torch.randn(groups, fan_in, width) / math.sqrt(fan_in))
        self.bias = nn.Parameter(0.1 * torch.randn(groups, width))

    def forward(self, log_snr: Tensor) -> Tensor:
        value = log_snr.flatten(1)[:, self.index].view(len(log_snr), -1, self.per_group)
        features = torch.cat([torch.sigmoid(value), torch.tanh(value / 4), (value / 16).clamp(-1, 1)], dim=-1)
        return torch.einsum("bgf,gfw->bgw", features, self.weight) + self.bias


class CrossAttention(nn.Module):
    """Pixels attend to the tokens of the noise state; the result is added to them."""

    def __init__(self, channels: int, token_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = nn.Linear(token_channels, 2 * channels)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        b, w, height, width = x.shape
        q = self.query(self.norm(x)).view(b, self.heads, w // self.heads, -1)
        k, v = self.key_value(tokens).view(b, -1, 2, self.heads, w // self.heads).permute(2, 0, 3, 4, 1)
        # written out, because likelihoods may need forward-mode derivatives, which fused attention lacks
        weights = torch.einsum("bhcp,bhcg->bhpg", q, k).mul((w // self.heads) ** -0.5).softmax(-1)
        mixed = torch.einsum("bhpg,bhcg->bhcp", weights, v).reshape(b, w, height, width)
        return x + self.out(mixed)


class Block(nn.Module):
    """Norm, SiLU, 3x3, scale and shift by the pooled noise state, SiLU, 3x3, plus the input."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.modulation = nn.Linear(condition, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return self.skip(x) + self.conv2(F.silu(h * (1 + scale) + shift))


class ComponentUNet(nn.Module):
    """x0_hat of whitened components from noisy ones, for any basis and any noise state; variance-preserving scaling.

    With signal^2 + noise^2 = 1 the prediction is signal z + noise U f(...), where f is the U-Net in pixels and U the
    orthonormal basis. At initialisation f = 0, and that is the optimum for independent normal components: posterior
    mean signal z, deviation `noise`. So U f is the residual in units of the posterior's deviation.

    The U-Net sees that Gaussian estimate as an image, its `fourier` features, and the whitened noisy components put
    back into pixels.

    Raises:
        ValueError: height or width cannot be halved as often as `channel_mult` requires.
    """

    offset: Tensor

    def __init__(self, config: NetConfig, basis: Whitened, levels: int) -> None:
        super().__init__()
        colours, height, width = basis.shape
        halvings = len(config.channel_mult) - 1
        if height % 2**halvings or width % 2**halvings:
            raise ValueError(
                f"channel_mult: sizes must be divisible by {2**halvings} for {halvings + 1} levels, "
                f"got {height}x{width}"
            )
        self.config, self.basis, self.levels = config, basis, levels
        widths = [config.channels * m for m in config.channel_mult]
        condition = 2 * config.token_channels
        self.noise_state = NoiseState(basis.ordering(), config.groups, config.token_channels)
        self.pool = nn.Sequential(nn.Linear(config.token_channels, condition), nn.SiLU())
        inputs = colours * (2 + 2 * config.fourier)
        self.first = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.place = nn.Parameter(0.1 * torch.randn(widths[0], height, width))
        self.down: Any = nn.ModuleList()
        self.up: Any = nn.ModuleList()
        self.attention_down, self.attention_up = nn.ModuleList(), nn.ModuleList()
        now = widths[0]
        for w in widths:
            self.down.append(nn.ModuleList([Block(now if i == 0 else w, w, condition) for i in range(config.blocks)]))
            self.attention_down.append(CrossAttention(w, config.token_channels, config.heads))
            now = w
        for w in reversed(widths[:-1]):
            self.up.append(nn.ModuleList([Block(now + w if i == 0 else w, w, condition) for i in range(config.blocks)]))
            self.attention_up.append(CrossAttention(w, config.token_channels, config.heads))
            now = w
        self.last_norm = nn.GroupNorm(8, now)
        self.last = _zero(nn.Conv2d(now, colours, 3, padding=1))
        # a PCA subtracts the mean of the data, which a residual does not have
        offset = basis.base.forward(torch.zeros(1, *basis.shape, dtype=torch.float64))
        self.register_buffer("offset", offset.to(self.place.dtype), persistent=False)

    def residual(self, z: Tensor, log_snr: Tensor) -> Tensor:
        """U f(...): (x0_hat - signal z) / noise, in components."""
        signal, _ = scales_of(log_snr, "vp")
        estimate = self.basis.inverse(signal * z)
        images = [estimate, self.basis.base.inverse(z)]
        for k in range(self.config.fourier):
            # x = 2 v / levels - 1, so this turns once for every 2^(1 - k) levels
            angle = (math.pi / 2 * 2**k * self.levels) * (estimate + 1)
            images += [angle.sin(), angle.cos()]
        tokens = self.noise_state(log_snr)
        condition = self.pool(tokens).mean(1)
        h = self.first(torch.cat(images, dim=1)) + self.place
        skips = []
        for level, (blocks, attention) in enumerate(zip(self.down, self.attention_down)):
            if level:
                skips.append(h)
                h = F.avg_pool2d(h, 2)
            for block in blocks:
                h = block(h, condition)
            h = attention(h, tokens)
        for blocks, attention in zip(self.up, self.attention_up):
            h = torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), skips.pop()], dim=1)
            for block in blocks:
                h = block(h, condition)
            h = attention(h, tokens)
        f = self.last(F.silu(self.last_norm(h)))
        return self.basis.base.forward(f) - self.offset

    def forward(self, z: Tensor, log_snr: Tensor) -> Tensor:
        """x0_hat (B, C, Y, X) of noisy components z and their log-SNR (B, C, Y, X), in the dtype of z.

        The network runs in fp32; for fp64 z only signal, noise and the sum are fp64.

        Raises:
            ValueError: a shape other than that of the basis.
        """
        if z.ndim != 4 or tuple(z.shape[1:]) != self.basis.shape:
            raise ValueError(f"z: must be (B, {', '.join(map(str, self.basis.shape))}), got {tuple(z.shape)}")
        if tuple(log_snr.shape) != tuple(z.shape):
            raise ValueError(
                f"log_snr: must have the shape {tuple(z.shape)} of z, one value for each component, "
                f"got {tuple(log_snr.shape)}"
            )
        signal, noise = scales_of(log_snr, "vp")
        dtype = self.place.dtype
        residual = self.residual(z.to(dtype), log_snr.to(dtype))
        return signal.to(z.dtype) * z + noise.to(z.dtype) * residual.to(z.dtype)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
