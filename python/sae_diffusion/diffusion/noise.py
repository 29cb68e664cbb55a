"""Noise levels of a training sequence, and the seeds everything random is derived from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class NoiseConfig:
    """How noise levels are drawn, in units of the normalised data (sigma_data = 1).

    Args:
        mean, std: of ln sigma of the noisy copies; the defaults are those of the reference's newest training on pixels.
        context_sigma_max: the clean copy of a clip carries noise of one level drawn from U(0, context_sigma_max), and
            the network is told that level, so that it learns to live with its own imperfect frames.
        context_sigma_min: the lowest level the network is told for context (its logarithm must be finite).
        context_sigma_label: the level the network is told at inference for context frames, which get no noise then.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    mean: float = 0.0
    std: float = 2.0
    context_sigma_max: float = 0.5
    context_sigma_min: float = 0.002
    context_sigma_label: float = 0.05

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"mean: must be finite, got {self.mean}")
        for name, least in (("std", 0.0), ("context_sigma_max", 0.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        for name in ("context_sigma_min", "context_sigma_label"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")


def sample_sigmas(
    config: NoiseConfig,
    batch: int,
    frames: int,
    noisy_copies: int,
    generator: torch.Generator | None = None,
    *,
    frames_per_block: int = 1,
) -> torch.Tensor:
    """Noise levels of a training sequence: one per clip for the clean stream, one per noisy frame (or block of frames).

    Returns (batch, (1 + noisy_copies) * frames) float32 on the generator's device, clean stream first. The frames of a
    block share their level, because they are denoised together at inference.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    context = torch.rand(batch, 1, generator=generator, device=device) * config.context_sigma_max
    blocks = -(-frames // frames_per_block)
    normal = torch.randn(batch, noisy_copies, blocks, generator=generator, device=device)
    noisy = (config.mean + config.std * normal).exp().repeat_interleave(frames_per_block, dim=2)[:, :, :frames]
    return torch.cat([context.clamp(min=config.context_sigma_min).expand(batch, frames), noisy.flatten(1)], dim=1)


def derive_seed(seed: int, *path: int) -> int:
    """A 63-bit seed for one purpose: independent of every other path, the same on every machine and world size."""
    words = np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)
    return int(words[0]) & (2**63 - 1)
