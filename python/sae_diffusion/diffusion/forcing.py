"""Diffusion forcing: a plain causal sequence in which every frame has a noise level of its own (Chen et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sae_kernels import FrameLayout, token_noise
from sae_kernels._deprecated import renamed_arguments

from .loss import frame_errors
from .noise import NoiseConfig, sample_sigmas


def forcing_sigmas(
    config: NoiseConfig,
    batch: int,
    frames: int,
    generator: torch.Generator | None = None,
    *,
    clean_frames: float = 0.25,
    frames_per_block: int = 1,
) -> torch.Tensor:
    """Independent noise levels (batch, frames), one for each frame or block of frames.

    ln sigma ~ N(mean, std^2) as for noisy copies. With probability `clean_frames` a block instead has a level from
    U(0, context_sigma_max), which the first distribution may never reach: the level of finished frames in sampling.
    """
    noisy = sample_sigmas(config, batch, frames, 1, generator, frames_per_block=frames_per_block)[:, frames:]
    draws = torch.rand(2, batch, -(-frames // frames_per_block), generator=generator, device=noisy.device)
    clean, level = draws.repeat_interleave(frames_per_block, dim=2)[:, :, :frames]
    finished = (level * config.context_sigma_max).clamp(min=config.context_sigma_min)
    return torch.where(clean < clean_frames, finished, noisy)


@renamed_arguments(raw="model_output")
def forcing_loss(
    denoiser: Callable[..., torch.Tensor],
    x0: torch.Tensor,
    actions: torch.Tensor | None,
    sigmas: torch.Tensor,
    *,
    seed: int,
    offset: int = 0,
    spatial_only: bool = False,
    sigma_data: float = 1.0,
    prior: Any = None,
    model_output: bool | None = None,
) -> torch.Tensor:
    """Weighted squared error of every frame of a noisy sequence that sees its own noisy past.

    The noise is that of the noisy copy in `denoising_loss` with the same seed, and so is the weight.

    Args:
        denoiser: called as denoiser(x, sigma, actions, noisy_copies=0), or with spatial_only=True in its place.
        x0: (B, T, C, Y, X) normalised clips.
        actions: (B, T) int64, (B, T, A) float or None.
        sigmas: (B, T), a level for each frame.
        seed, offset, spatial_only, sigma_data, prior, model_output: as in `denoising_loss`.

    Returns:
        (B, T) in fp32 (fp64 where the denoiser's output is).

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x0.ndim != 5 or sigmas.shape != x0.shape[:2]:
        raise ValueError(
            f"sigmas: must have shape (B, T) of x0 (B, T, C, Y, X), got {tuple(sigmas.shape)} and {tuple(x0.shape)}"
        )
    if model_output is None:
        model_output = getattr(denoiser, "gives_model_output", False)
    frames, tokens = x0.shape[1], x0.shape[-2] * x0.shape[-1]
    layout = FrameLayout(frames=frames, tokens_per_frame=tokens, noisy_copies=1)
    levels = torch.cat([sigmas, sigmas], dim=1)
    x: Any = token_noise(x0.contiguous(), torch.ones_like(levels), levels, layout, seed=seed, offset=offset)
    options: dict[str, Any] = {"spatial_only": True} if spatial_only else {"noisy_copies": 0}
    if model_output:
        options["model_output"] = True
    output = denoiser(x[:, frames:], sigmas, actions, **options)
    expected = None if prior is None or spatial_only else prior(x[:, frames:], sigmas)
    return frame_errors(
        output, x0, sigmas, layout, model_output=model_output, seed=seed, offset=offset, sigma_data=sigma_data,
        expected=expected,
    )  # fmt: skip
