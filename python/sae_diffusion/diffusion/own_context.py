"""A network's own frames in place of recorded ones, as in the context that it has when it generates."""

from __future__ import annotations

import math
from typing import Any

import torch

from .config import OwnContextConfig


def share_of_own_frames(config: OwnContextConfig, step: int) -> float:
    """The largest share of a clip's frames that are replaced at optimizer step `step`."""
    if config.start is None or step < config.start:
        return 0.0
    return min((step - config.start + 1) / config.ramp, 1.0) if config.ramp else 1.0


@torch.no_grad()
def with_own_frames(
    denoiser: Any,
    x0: torch.Tensor,
    actions: torch.Tensor | None,
    context_sigmas: torch.Tensor,
    config: OwnContextConfig,
    share: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Clips in which some frames are replaced by the network's own estimates from the recorded frames before them.

    Each frame starts from noise at a level drawn log-uniformly from [sigma_min, sigma_max] and takes `steps` Euler
    steps, all frames of the clip at once. An estimate replaces its frame with a probability that is drawn for each clip
    from U(0, share); the first `given` frames stay. The estimates are made 1 to `depth` times, each time
    from the clips that hold the previous estimates.

    Args:
        denoiser: a `Denoiser`.
        x0: (B, T, C, Y, X) normalised clips.
        actions: (B, T) int64, (B, T, A) float or None.
        context_sigmas: (B, T) levels with which the clips are labelled.
        generator: on the CPU.

    Returns:
        (B, T, C, Y, X).
    """
    batch, frames = x0.shape[:2]
    block = denoiser.config.frames_per_block

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).repeat_interleave(block, dim=-1)[..., :frames].to(x0.device)

    blocks = -(-frames // block)
    low, high = math.log(config.sigma_min), math.log(config.sigma_max)
    replaced = draw(batch, blocks) < share * torch.rand(batch, 1, generator=generator).to(x0.device)
    replaced[:, : config.given] = False
    mixed = x0
    depth = int(torch.randint(config.depth, (), generator=generator)) + 1
    for _ in range(depth):
        sigma = (low + (high - low) * draw(batch, blocks)).exp()
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        x = x0 + sigma.view(batch, frames, 1, 1, 1) * noise
        for left in range(config.steps, 0, -1):
            levels = torch.cat([context_sigmas, sigma], dim=1)
            own = denoiser(torch.cat([mixed, x], dim=1), levels, actions, noisy_copies=1)[:, frames:]
            x = own + (x - own) * ((left - 1) / left)
            sigma = sigma * ((left - 1) / left)
        mixed = torch.where(replaced.view(batch, frames, 1, 1, 1), own.to(x0.dtype), x0)
    return mixed
