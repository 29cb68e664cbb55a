"""The training objectives of a video network: the noise levels of a clip, and the loss of its noisy frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..diffusion.forcing import forcing_loss, forcing_sigmas
from ..diffusion.loss import denoising_loss
from ..diffusion.noise import sample_sigmas
from .config import TrainConfig


def draw_levels(config: TrainConfig, model: Any, batch: int, frames: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels of all frames that the network sees."""
    options: dict[str, Any] = {"frames_per_block": int(getattr(model.config, "frames_per_block", 1))}
    if config.objective == "forcing":
        return forcing_sigmas(config.noise, batch, frames, generator, clean_frames=config.clean_frames, **options)
    return sample_sigmas(config.noise, batch, frames, config.noisy_copies, generator, **options)


def frame_losses(
    config: TrainConfig,
    model: Any,
    x0: torch.Tensor,
    actions: torch.Tensor | None,
    levels: torch.Tensor,
    *,
    seed: int,
    spatial_only: bool = False,
    module: Callable[..., torch.Tensor] | None = None,
    context: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise level and weighted loss of each noisy frame, both (B, n); `module` is the model as called."""
    options: dict[str, Any] = {
        "seed": seed,
        "spatial_only": spatial_only,
        "sigma_data": float(getattr(model.config, "sigma_data", 1.0)),
        "prior": getattr(model, "prior", None),
        "model_output": bool(getattr(model, "gives_model_output", False)),
    }
    module = model if module is None else module
    if config.objective == "forcing":
        return levels, forcing_loss(module, x0, actions, levels, **options)
    losses = denoising_loss(module, x0, actions, levels, noisy_copies=config.noisy_copies, context=context, **options)
    return levels[:, x0.shape[1] :], losses


def mean_loss(config: TrainConfig, model: Any, losses: torch.Tensor) -> torch.Tensor:
    """The mean of the losses of whole clips, in any shape that ends in frames, under `first_weight`."""
    if config.first_weight == 1:
        return losses.mean()
    weights = losses.new_ones(config.clip_length)
    weights[: model.config.frames_per_block] = config.first_weight
    return (losses.reshape(-1, config.clip_length) * weights).mean() / weights.mean()
