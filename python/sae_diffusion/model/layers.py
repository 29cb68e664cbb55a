"""Magnitude-preserving layers without time: weights, embeddings, resampling.

Equation numbers are those of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models".
Activations are (B, C, F, Y, X) in channels_last_3d memory, physically (B, F, Y, X, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_kernels import normalize_weight, normalize_weights_


class NormalizedModule(nn.Module):
    """A module that learns the direction of its weights for each output channel, not their magnitude (eq. 47, 66)."""

    def __init__(self) -> None:
        super().__init__()
        self._effective: dict[str, tuple[tuple, Tensor]] = {}
        # Normalised weights for the current pass, where the network makes those of all layers at once.
        self.given: dict[nn.Parameter, Tensor] = {}

    def raw_weights(self) -> Iterator[nn.Parameter]:
        """The stored weights that forward normalises."""
        raise NotImplementedError

    def normalized(self, weight: nn.Parameter) -> Tensor:
        """The direction of a stored weight, scaled to preserve variance (gain 1 / sqrt(fan-in))."""
        given = self.given.get(weight)
        return normalize_weight(weight) if given is None else given

    def normalize_weights_(self) -> None:
        """Overwrite each stored weight with its direction, at unit RMS for each output channel (forced weight norm)."""
        normalize_weights_(list(self.raw_weights()))

    def effective(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        """`build()`, a weight as forward uses it; kept under `name` while sampling with unchanged parameters.

        At 4x4 pixels normalising a weight costs more than its convolution. Kept only in eval mode without gradients;
        dropped by train(), eval() and conversions. Version counters detect every change of the parameter except a write
        through `.data`: call eval() after one.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return build()
        key = tuple((w._version, w.data_ptr(), w.dtype, w.device) for w in self.raw_weights())
        kept = self._effective.get(name)
        if kept is None or kept[0] != key:
            kept = self._effective[name] = (key, build())
        return kept[1]

    def train(self, mode: bool = True) -> NormalizedModule:
        self._effective = {}
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self._effective = {}
        return super()._apply(*args, **kwargs)


class Linear(NormalizedModule):
    """Normalised linear layer without bias on the last dimension; a 1x1 convolution on a channels-last tensor."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def raw_weights(self) -> Iterator[nn.Parameter]:
        yield self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective("weight", lambda: self.normalized(self.weight)))


def pointwise(linear: Linear, x: Tensor) -> Tensor:
    """`linear` as a 1x1 convolution on (B, C, F, Y, X); no copy in channels_last_3d memory."""
    return linear(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class Fourier(nn.Module):
    """Random Fourier features sqrt(2) cos(x f + phi) of a scalar, f = 2 pi N(0, 1), phi = 2 pi U(0, 1) (eq. 75)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))

    def forward(self, x: Tensor) -> Tensor:
        angle = x[..., None] * self.frequencies.to(x.dtype) + self.phases.to(x.dtype)
        return angle.cos() * math.sqrt(2)


def as_images(x: Tensor) -> Tensor:
    """(B, C, F, Y, X) -> (B F, C, Y, X), a view in channels_last_3d memory."""
    B, C, frames, Y, X = x.shape
    return x.permute(0, 2, 1, 3, 4).reshape(B * frames, C, Y, X)


def as_video(x: Tensor, batch: int) -> Tensor:
    """(B F, C, Y, X) -> (B, C, F, Y, X), a view in channels_last memory."""
    _, C, Y, X = x.shape
    return x.reshape(batch, -1, C, Y, X).permute(0, 2, 1, 3, 4)


def downsample(x: Tensor) -> Tensor:
    """Mean of each 2x2 square of each frame."""
    return as_video(F.avg_pool2d(as_images(x), 2), x.shape[0])


def upsample(x: Tensor) -> Tensor:
    """Each pixel of each frame becomes a 2x2 square."""
    return as_video(F.interpolate(as_images(x), scale_factor=2, mode="nearest"), x.shape[0])
