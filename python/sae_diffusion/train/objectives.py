"""What is asked of a video network: which noise levels a clip gets, and the loss of its noisy frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..diffusion.forcing import forcing_loss, forcing_sigmas
from ..diffusion.loss import denoising_loss
from ..diffusion.noise import sample_sigmas
from .config import TrainConfig


class TeacherForcing:
    """Noisy frames see the clean frames before them.

    Args:
        config: of the run.
        model: its `sigma_data`, `frames_per_block` and `gives_raw_output` are asked.
    """

    def __init__(self, config: TrainConfig, model: Any) -> None:
        self.config = config
        self.frames_per_block = int(getattr(model.config, "frames_per_block", 1))
        self.options: dict[str, Any] = {
            "sigma_data": float(getattr(model.config, "sigma_data", 1.0)),
            "raw": bool(getattr(model, "gives_raw_output", False)),
        }

    def levels(self, batch: int, frames: int, generator: torch.Generator) -> torch.Tensor:
        """Noise levels of all frames that the network sees."""
        return sample_sigmas(
            self.config.noise, batch, frames, self.config.noisy_copies, generator,
            frames_per_block=self.frames_per_block,
        )  # fmt: skip

    def losses(
        self,
        denoiser: Callable[..., torch.Tensor],
        x0: torch.Tensor,
        actions: torch.Tensor | None,
        levels: torch.Tensor,
        *,
        seed: int,
        spatial_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise level and weighted loss of each noisy frame, both (B, n)."""
        losses = denoising_loss(
            denoiser, x0, actions, levels, noisy_copies=self.config.noisy_copies, seed=seed, spatial_only=spatial_only,
            **self.options,
        )  # fmt: skip
        return levels[:, x0.shape[1] :], losses


class Forcing(TeacherForcing):
    """Diffusion forcing: one sequence, whose frames see each other's noisy frames."""

    def levels(self, batch: int, frames: int, generator: torch.Generator) -> torch.Tensor:
        config = self.config
        return forcing_sigmas(
            config.noise, batch, frames, generator, clean_frames=config.clean_frames,
            frames_per_block=self.frames_per_block,
        )  # fmt: skip

    def losses(
        self,
        denoiser: Callable[..., torch.Tensor],
        x0: torch.Tensor,
        actions: torch.Tensor | None,
        levels: torch.Tensor,
        *,
        seed: int,
        spatial_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return levels, forcing_loss(denoiser, x0, actions, levels, seed=seed, spatial_only=spatial_only, **self.options)


def make_objective(config: TrainConfig, model: Any) -> TeacherForcing:
    return (Forcing if config.objective == "forcing" else TeacherForcing)(config, model)
