"""The prior of a frame before it is denoised: the mean and deviation on which preconditioning is built."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import ModelConfig


class FramePrior:
    """N(mean, std^2) for each frame, from the last frame before it that the network sees.

    "data" is N(0, d^2), d = sigma_data, for all frames (Karras et al. 2022, table 1). "previous-frame" takes the frame
    y seen last before the block, at noise level r: of N(0, d^2) it leaves N(w y, d^2 (1 - w)), w = d^2 / (d^2 + r^2),
    and the j-th frame after it is a random walk away whose steps have the deviation c = change_std,
    N(w y, d^2 (1 - w) + j c^2). At r = 0 that is N(y, j c^2); a frame without past has the prior "data".
    """

    def __init__(self, config: ModelConfig) -> None:
        self.uses_past = config.prior == "previous-frame"
        self.sigma_data, self.change_std = config.sigma_data, config.change_std
        self.block = config.frames_per_block

    def __call__(
        self, seen: Tensor, sigma: Tensor, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Priors of T consecutive frames, the same for all noisy copies of them.

        Args:
            seen: (B, T, ...) what later frames see of them: the clean stream, or the sequence itself.
            sigma: (B, T) their noise levels.
            before: the frame (B, ...) before frame 0 and its level (B,), if there is one.

        Returns:
            mean (B, T, ...) and std (B, T); None if it is N(0, sigma_data^2) for all of them.
        """
        frames = sigma.shape[1]
        if not self.uses_past or (before is None and frames <= self.block):
            return None
        if before is None:
            # before the first frame there is only noise
            before = torch.zeros_like(seen[:, 0]), torch.full_like(sigma[:, 0], torch.inf)
        seen, sigma = torch.cat([before[0][:, None], seen], dim=1), torch.cat([before[1][:, None], sigma], dim=1)
        index = torch.arange(frames, device=sigma.device)
        last, ahead = index // self.block * self.block, (index % self.block + 1).to(sigma)
        squared = sigma[:, last].square()
        weight = self.sigma_data**2 / (self.sigma_data**2 + squared)
        walked = (ahead * self.change_std**2).masked_fill(squared.isinf(), 0.0)
        mean = seen[:, last] * weight.view(weight.shape + (1,) * (seen.ndim - 2))
        return mean, (self.sigma_data**2 * (1 - weight) + walked).sqrt()
