"""Conversion between frames on disk and the normalised frames that the network sees."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checks import Count, check_value

if TYPE_CHECKING:
    from .dataset import ClipDataset


def _spread(dataset: ClipDataset, max_clips: int) -> list[int]:
    """Indices of up to `max_clips` clips, evenly over the data set."""
    check_value("max_clips", max_clips, Count)
    return np.unique(np.linspace(0, len(dataset) - 1, min(max_clips, len(dataset))).round().astype(int)).tolist()


@dataclass(frozen=True)
class FrameStats:
    """Per-channel mean and standard deviation of a training set, so that the network's data has sigma_data = 1.

    In units of uint8 / 127.5 - 1 for images, in the latents' own units where `latent`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    latent: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean, std: must have one number per channel, got {len(self.mean)} and {len(self.std)}")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(s) and s > 0 for s in self.std):
            raise ValueError(f"mean, std: must be finite, and std > 0, got {self.mean} and {self.std}")

    @classmethod
    def estimate(cls, dataset: ClipDataset, max_clips: int = 64) -> FrameStats:
        """From up to `max_clips` clips spread evenly over the data set, in fp64; a constant channel gets std 1."""
        count, mean, squares = 0, np.zeros(dataset.frame_shape[2]), np.zeros(dataset.frame_shape[2])
        # Chan et al. 1979: merging means and sums of squares keeps large offsets exact
        for index in _spread(dataset, max_clips):
            x = dataset[index].frames.reshape(-1, dataset.frame_shape[2]).astype(np.float64)
            x = x if dataset.is_latent else x / 127.5 - 1
            delta, total = x.mean(0) - mean, count + len(x)
            squares += ((x - x.mean(0)) ** 2).sum(0) + delta**2 * count * len(x) / total
            mean, count = mean + delta * len(x) / total, total
        std = np.sqrt(squares / count)
        constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
        return cls(tuple(mean.tolist()), tuple(np.where(constant, 1.0, std).tolist()), dataset.is_latent)

    def change_std(self, dataset: ClipDataset, max_clips: int = 64) -> float:
        """Root mean square of the change from one normalised frame to the next, in `max_clips` clips; 1 without any."""
        squares, count = 0.0, 0
        for index in _spread(dataset, max_clips):
            change = self.normalize(dataset[index].frames).double().diff(dim=0)
            squares, count = squares + change.square().sum().item(), count + change.numel()
        return math.sqrt(squares / count) if squares else 1.0

    def _tensors(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(torch.float32, like.dtype)
        return like.new_tensor(self.mean, dtype=dtype), like.new_tensor(self.std, dtype=dtype)

    def normalize(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """(..., T, Y, X, C) uint8 (latents: floats) -> float32 (..., T, C, Y, X), channels-last in memory."""
        x = torch.as_tensor(frames)
        if self.latent != x.is_floating_point() or (not self.latent and x.dtype != torch.uint8):
            raise TypeError(f"frames: must be {'floats (latents)' if self.latent else 'uint8'}, got {x.dtype}")
        if x.ndim < 4 or x.shape[-1] != len(self.mean):
            raise ValueError(f"frames: must be (..., T, Y, X, {len(self.mean)}), got {tuple(x.shape)}")
        x = x.to(torch.float32)
        mean, std = self._tensors(x)
        if not self.latent:
            x = x / 127.5 - 1
        return ((x - mean) / std).movedim(-1, -3)

    def denormalize(self, x: torch.Tensor) -> torch.Tensor:
        """(..., T, C, Y, X) floats -> (..., T, Y, X, C): uint8, rounded and clamped, or floats for latents."""
        if not x.is_floating_point():
            raise TypeError(f"x: must be floating-point, got {x.dtype}")
        if x.ndim < 4 or x.shape[-3] != len(self.mean):
            raise ValueError(f"x: must be (..., T, {len(self.mean)}, Y, X), got {tuple(x.shape)}")
        mean, std = self._tensors(x)
        y = x.movedim(-3, -1).to(mean.dtype) * std + mean
        if self.latent:
            return y
        return ((y + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def to_json(self) -> str:
        return json.dumps({"mean": self.mean, "std": self.std, "latent": self.latent})

    @classmethod
    def from_json(cls, text: str) -> FrameStats:
        value: dict[str, Any] = json.loads(text)
        return cls(tuple(map(float, value["mean"])), tuple(map(float, value["std"])), bool(value["latent"]))
