"""How well a network denoises clips it was not trained on: by noise level, by frame, and with less and less past.

N clips of T frames, S noise levels, f frames per block. Errors are mean squares over C, Y, X of the normalised data,
not weighted, so that networks of any preconditioning can be compared, with each other and with repeating a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..diffusion.noise import derive_seed
from ..train.evaluate import chosen_clips, evaluating, normalised_batches
from .intervals import Bootstrap

SIGMAS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


def denoising_errors(
    denoiser: Any,
    dataset: Any,
    stats: Any,
    sigmas: Sequence[float] = SIGMAS,
    *,
    clips: int = 16,
    batch_size: int = 4,
    context_sigma: float = 0.05,
    seed: int = 0,
    callback: Callable[[float], None] | None = None,
) -> dict[str, np.ndarray]:
    """Errors of D with the whole past, with the last block only, with no past, and of the last frame before the block.

    No past means the block as the first one of a clip, which every training clip has, so the network knows that case.
    All three see the same noisy frames: noise is a function of the seed, the level and the clip's place in the
    selection. Context frames carry no noise and are labelled context_sigma, as at inference.

    Args:
        denoiser: a `Denoiser`; dataset: clips by number; clips: how many, spread evenly, each of at least two blocks.
        callback: called with the share that is done.

    Returns:
        {"full_context", "last_frame", "no_context"}, each (N, S, T), and {"copy"} (N, T); NaN in the first block, but
        for full_context, whose first block has no past.

    Raises:
        ValueError: clips of one block.
    """
    device, block = next(denoiser.parameters()).device, denoiser.config.frames_per_block
    indices = chosen_clips(dataset, clips)
    rows: dict[str, list[torch.Tensor]] = {"full_context": [], "last_frame": [], "no_context": [], "copy": []}
    done = 0
    with evaluating(denoiser):
        for x0, actions in normalised_batches(denoiser, dataset, stats, indices, batch_size, device):
            batch, frames = x0.shape[:2]
            if frames < 2 * block:
                raise ValueError(f"dataset: clips must have two blocks = {2 * block} frames, got {frames}")
            before = torch.arange(block, frames) // block * block - 1
            rows["copy"].append(_error(x0[:, before], x0[:, block:], block))
            levels: dict[str, list[torch.Tensor]] = {"full_context": [], "last_frame": [], "no_context": []}
            for level, sigma in enumerate(sigmas):
                generators = [torch.Generator().manual_seed(derive_seed(seed, level, done + i)) for i in range(batch)]
                noise = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators])
                call = _Call(denoiser, x0, x0 + sigma * noise.to(device), actions, sigma, context_sigma)
                levels["full_context"].append(_error(call.with_past(slice(None)), x0))
                levels["last_frame"].append(_error(call.by_block(block, past=block), x0[:, block:], block))
                levels["no_context"].append(_error(call.by_block(block, past=0), x0[:, block:], block))
                if callback is not None:
                    callback((done + batch * (level + 1) / len(sigmas)) / len(indices))
            for name, parts in levels.items():
                rows[name].append(torch.stack(parts, dim=1))
            done += batch
    return {name: torch.cat(parts).cpu().numpy() for name, parts in rows.items()}


def summarise_errors(
    errors: dict[str, np.ndarray], sigmas: Sequence[float], block: int, bootstrap: Bootstrap
) -> dict[str, Any]:
    """Means over clips with their intervals, as JSON has them.

    Returns:
        sigma, clips; full_context, last_frame, no_context by level and copy, all over the same frames, those with a
        past; by_frame: full_context (S, T) and copy (T), from frame 0, which has no past.
    """
    past = {name: table[..., block:].mean(-1) for name, table in errors.items()}
    return {
        "sigma": [float(s) for s in sigmas],
        "clips": len(errors["copy"]),
        **{name: bootstrap.estimate(table) for name, table in past.items()},
        "by_frame": {name: bootstrap.estimate(errors[name]) for name in ("full_context", "copy")},
    }


def _error(x: torch.Tensor, x0: torch.Tensor, missing: int = 0) -> torch.Tensor:
    """(B, missing + F) in fp64, NaN for the frames missing at the beginning."""
    error = (x.double() - x0.double()).square().mean(dim=(2, 3, 4))
    return torch.cat([error.new_full((len(error), missing), float("nan")), error], dim=1)


class _Call:
    """D of parts of clips at one noise level."""

    def __init__(
        self, denoiser: Any, x0: torch.Tensor, noisy: torch.Tensor, actions: torch.Tensor | None, sigma: float,
        context_sigma: float,
    ) -> None:  # fmt: skip
        self.denoiser, self.x0, self.noisy, self.actions = denoiser, x0, noisy, actions
        self.sigma, self.context_sigma = sigma, context_sigma

    def with_past(self, window: slice) -> torch.Tensor:
        x0, noisy = self.x0[:, window], self.noisy[:, window]
        told = None if self.actions is None else self.actions[:, window]
        batch, frames = x0.shape[:2]
        levels = [x0.new_full((batch, frames), level) for level in (self.context_sigma, self.sigma)]
        return self.denoiser(torch.cat([x0, noisy], dim=1), torch.cat(levels, dim=1), told, noisy_copies=1)[:, frames:]

    def by_block(self, block: int, past: int) -> torch.Tensor:
        """Each block after the first as the last one of a clip that begins `past` frames before it."""
        starts = range(block, self.x0.shape[1], block)
        return torch.cat([self.with_past(slice(s - past, s + block))[:, past:] for s in starts], dim=1)
