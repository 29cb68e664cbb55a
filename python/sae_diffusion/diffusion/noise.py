"""Noise levels of a training sequence, and the seeds from which all random numbers are derived."""

from __future__ import annotations

import numpy as np
import torch

from .config import NoiseConfig


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
    """A 63-bit seed for one purpose: independent of every other path, and equal on every machine and world size."""
    words = np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)
    return int(words[0]) & (2**63 - 1)
