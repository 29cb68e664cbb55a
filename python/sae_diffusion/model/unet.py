"""The EDM2 U-Net ("config G" of Karras et al. 2024) with causal convolutions and attention over frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_kernels import modulated_silu, mp_cat, mp_silu, mp_sum, pixel_norm_silu

from .attention import Attention, SpatialAttention, TemporalAttention
from .config import ModelConfig
from .conv import CausalConv
from .frame_pass import FramePass
from .layers import Fourier, Linear, downsample, pointwise, upsample

RESIDUAL_BALANCE = 0.3
SKIP_BALANCE = 0.5
ACTION_BALANCE = 1 / 3
# Keeps half precision finite; activations are of order 1, so a healthy network never reaches it.
ACTIVATION_LIMIT = 256.0


class Embedding(nn.Module):
    """Noise level and action of each frame -> (B, F, features) of order 1.

    A discrete action is a one-hot vector times sqrt(num_actions); continuous ones are expected to have about unit
    variance. For a frame without an action (-1, NaN, or no actions) it is the embedding of the noise level alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        features = max(config.level_channels)
        self.num_actions = config.num_actions
        self.action_dim = config.action_dim
        self.fourier = Fourier(config.level_channels[0])
        self.noise = Linear(config.level_channels[0], features)
        inputs = config.num_actions or config.action_dim
        self.action = Linear(inputs, features) if inputs else None

    def forward(self, c_noise: Tensor, actions: Tensor | None, streams: int) -> Tensor:
        """c_noise (B, F); actions (B, F / streams) integers or (B, F / streams, A) floats, shared by all streams."""
        dtype = self.noise.weight.dtype
        emb = self.noise(self.fourier(c_noise).to(dtype))
        if self.action is not None and actions is not None:
            if self.num_actions:
                known = actions >= 0
                one_hot = F.one_hot(actions.clamp(min=0), self.num_actions).to(dtype)
                label = self.action(one_hot * self.num_actions**0.5)
            else:
                known = ~actions.isnan().any(dim=-1)
                label = self.action(actions.nan_to_num(nan=0.0).to(dtype))
            known, label = known[..., None].repeat(1, streams, 1), label.repeat(1, streams, 1)
            emb = torch.where(known, mp_sum(emb, label, ACTION_BALANCE), emb)
        return mp_silu(emb)


class Block(nn.Module):
    """Residual block of two causal convolutions, modulated by the embedding, and an optional attention.

    Args:
        encoder: encoder blocks first change the number of channels and normalise each pixel; decoder blocks change it
            on the main path of the residual.
        resample: None, "down" or "up", before everything else.
        attention: None, "video" or "frame".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: ModelConfig,
        *,
        encoder: bool,
        resample: str | None = None,
        attention: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.resample = {None: None, "down": downsample, "up": upsample}[resample]
        self.dropout = config.dropout
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.emb = Linear(max(config.level_channels), out_channels)
        self.conv0 = CausalConv(out_channels if encoder else in_channels, out_channels, config)
        self.conv1 = CausalConv(out_channels, out_channels, config)
        self.skip = Linear(in_channels, out_channels) if in_channels != out_channels else None
        self.attention: Attention | None = None
        if attention is not None:
            kind = {"video": TemporalAttention, "frame": SpatialAttention}[attention]
            self.attention = kind(out_channels, config)

    def forward(self, x: Tensor, emb: Tensor, frames: FramePass) -> Tensor:
        """x (B, C, F, Y, X), emb (B, F, E) -> (B, C', F, Y', X')."""
        if self.resample is not None:
            x = self.resample(x)
        if self.encoder:
            if self.skip is not None:
                x = pointwise(self.skip, x)
            x, y = pixel_norm_silu(x, dim=1)
        else:
            y = mp_silu(x)
        y = self.conv0(y, frames)
        y = modulated_silu(y, self.emb(emb) * self.emb_gain + 1)
        if self.training and self.dropout:
            y = F.dropout(y, self.dropout)
        y = self.conv1(y, frames)
        if not self.encoder and self.skip is not None:
            x = pointwise(self.skip, x)
        if self.attention is not None:
            x = mp_sum(x, y, RESIDUAL_BALANCE)
            y = self.attention(x, frames)
        return mp_sum(x, y, RESIDUAL_BALANCE, limit=ACTIVATION_LIMIT)


class UNet(nn.Module):
    """x (B, C, F, Y, X) in channels_last_3d memory -> the same shape; C counts channels after space-to-depth."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        levels = tuple(zip(config.heights, config.level_channels, strict=True))

        def attention(height: int) -> str | None:
            if height in config.video_attention:
                return "video"
            return "frame" if height in config.frame_attention else None

        self.embedding = Embedding(config)
        channels = config.level_channels[0]
        # One more input channel, constant 1, in place of biases, which no layer has.
        self.conv_in = CausalConv(config.input_channels + 1, channels, config)
        skips = [channels]
        self.encoder = nn.ModuleDict()
        for level, (height, out) in enumerate(levels):
            if level > 0:
                self.encoder[f"{height}_down"] = Block(channels, channels, config, encoder=True, resample="down")
                skips.append(channels)
            for i in range(config.blocks_per_level):
                self.encoder[f"{height}_{i}"] = Block(channels, out, config, encoder=True, attention=attention(height))
                channels = out
                skips.append(channels)

        self.decoder = nn.ModuleDict()
        height = levels[-1][0]
        self.decoder[f"{height}_in0"] = Block(channels, channels, config, encoder=False, attention="video")
        self.decoder[f"{height}_in1"] = Block(channels, channels, config, encoder=False)
        self.takes_skip = set()
        for height, out in reversed(levels):
            if height != levels[-1][0]:
                self.decoder[f"{height}_up"] = Block(channels, channels, config, encoder=False, resample="up")
            for i in range(config.blocks_per_level + 1):
                name = f"{height}_{i}"
                self.decoder[name] = Block(
                    channels + skips.pop(), out, config, encoder=False, attention=attention(height)
                )
                self.takes_skip.add(name)
                channels = out
        self.conv_out = CausalConv(channels, config.patch_channels, config)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, actions: Tensor | None, frames: FramePass) -> Tensor:
        """actions: (B, frames) or (B, frames, A), those of one stream."""
        emb = self.embedding(frames.c_noise, actions, 1 + frames.noisy_copies)
        channels_last = x.permute(0, 2, 3, 4, 1)
        ones = channels_last.new_ones(()).expand(*channels_last.shape[:-1], 1)
        x = self.conv_in(torch.cat((channels_last, ones), dim=-1).permute(0, 4, 1, 2, 3), frames)
        skips = [x]
        for block in self.encoder.values():
            x = block(x, emb, frames)
            skips.append(x)
        for name, block in self.decoder.items():
            if name in self.takes_skip:
                x = mp_cat(x, skips.pop(), dim=1, t=SKIP_BALANCE)
            x = block(x, emb, frames)
        return self.conv_out(x, frames) * self.out_gain
