"""The causal convolution with its weights: joint or gated mixing of past and present."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_kernels import causal_conv3d, normalize_weight, past_term

from .cache import PAD_VALUE
from .config import ModelConfig
from .frame_pass import FramePass
from .layers import NormalizedModule, as_images, as_video


class FrameGate(nn.Module):
    """How much of a frame's output comes from the past, as a function of its noise level and absolute position.

    s = m1 c_noise + m2 log(1 + position) + o, g = lo + (1 - lo) hi sigmoid(s), with lo and hi sigmoids of learned
    limits. g is about 0.007 to 0.013 at first, so training begins almost without the past.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.tensor([1.5, -0.5]))
        self.offset = nn.Parameter(torch.tensor(0.0))
        self.limits = nn.Parameter(torch.tensor([-5.0, -5.0]))

    def forward(self, c_noise: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (last, past) of mp_sum(last, past, g), each (B, F): (1 - g) / n and g / n, n = hypot(1 - g, g)."""
        position = torch.log1p(positions.to(c_noise.dtype))
        s = self.slopes[0] * c_noise + self.slopes[1] * position + self.offset
        low, high = torch.sigmoid(self.limits)
        g = low + (1 - low) * high * torch.sigmoid(s)
        norm = torch.sqrt((1 - g) ** 2 + g**2)
        return (1 - g) / norm, g / norm


class CausalConv(NormalizedModule):
    """Normalised 3x3 convolution over the last kt frames; earlier frames are read from the clean stream.

    joint: one weight (O, I, kt, 3, 3), normalised over 9 kt I inputs; a plain sum of its taps. gated: the last taps
    (O, I, 3, 3) and the past taps (O, I, kt - 1, 3, 3) are normalised separately and mixed by a `FrameGate`. A frame by
    itself (spatial pass) uses the last taps only; with "joint" these are scaled by sqrt(kt), because they carry 1 / kt
    of the output's variance.
    """

    def __init__(self, in_channels: int, out_channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.kernel_frames = config.kernel_frames
        self.impl = config.impl
        self.key = ""
        if config.temporal_mixing == "joint":
            self.weight = nn.Parameter(torch.randn(out_channels, in_channels, config.kernel_frames, 3, 3))
            self.gate = None
        else:
            self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
            self.past_weight = nn.Parameter(torch.randn(out_channels, in_channels, config.kernel_frames - 1, 3, 3))
            self.gate = FrameGate()

    def raw_weights(self) -> Iterator[nn.Parameter]:
        yield self.weight
        if self.gate is not None:
            yield self.past_weight

    def _all_taps(self) -> Tensor:
        """(O, I, kt, 3, 3)."""
        weight = self.normalized(self.weight)
        if self.gate is None:
            return weight
        return torch.cat((self.normalized(self.past_weight), weight[:, :, None]), dim=2)

    def _last_taps(self, gain: float) -> Tensor:
        """(O, I, 3, 3), ready for conv2d."""
        weight = normalize_weight(self.weight, gain=gain)
        last = weight[:, :, -1] if self.gate is None else weight
        return last.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, frames: FramePass) -> Tensor:
        """x (B, I, F, Y, X) -> (B, O, F, Y, X)."""
        if frames.mode == "spatial":
            return self._present(x, "spatial", 1.0 if self.gate is not None else math.sqrt(self.kernel_frames))
        last_scale, past_scale = self._scales(x, frames)
        if frames.mode == "sequence":
            return self._causal(x, frames, last_scale, past_scale, None)
        entry = frames.cache.conv(self.key, x)
        if frames.mode == "denoise" and frames.config.frames_per_block == 1:
            past = entry.past(lambda history: past_term(history, self._all_taps(), impl=self.impl))[:, :, None]
            y = self._present(x, "last", 1.0)
            if last_scale is None or past_scale is None:
                return y + past
            return last_scale[:, None, :, None, None] * y + past_scale[:, None, :, None, None] * past
        y = self._causal(x, frames, last_scale, past_scale, entry.history)
        if frames.mode == "prefill":
            entry.append(x)
        return y

    def _scales(self, x: Tensor, frames: FramePass) -> tuple[Tensor | None, Tensor | None]:
        """(last_scale, past_scale), each (B, F) or None for 1."""
        if self.gate is None:
            return None, None
        last_scale, past_scale = self.gate(frames.c_noise, frames.positions)
        return last_scale.to(x.dtype), past_scale.to(x.dtype)

    def _present(self, x: Tensor, name: str, gain: float) -> Tensor:
        weight = self.effective(name, lambda: self._last_taps(gain))
        return as_video(F.conv2d(as_images(x), weight, padding=1), x.shape[0])

    def _causal(
        self,
        x: Tensor,
        frames: FramePass,
        last_scale: Tensor | None,
        past_scale: Tensor | None,
        history: Tensor | None,
    ) -> Tensor:
        return causal_conv3d(
            x,
            self._all_taps(),
            frames.layout(x.shape[3] * x.shape[4]),
            past_scale=past_scale,
            last_scale=last_scale,
            history=history,
            pad_value=PAD_VALUE,
            impl=self.impl,
        )
