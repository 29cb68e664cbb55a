"""The training loss of held-out clips, measured while a network is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..data import collate
from ..diffusion.noise import derive_seed
from .config import TrainConfig
from .objectives import draw_levels, frame_losses, mean_loss

HELDOUT = 100  # purpose of derived seeds, apart from those of training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def chosen_clips(dataset: Any, clips: int) -> list[int]:
    """Indices of up to `clips` clips, spread evenly over the data set."""
    count = min(clips, len(dataset))
    if count < 1:
        raise ValueError(f"clips, dataset: must be at least one clip, got {clips} of {len(dataset)}")
    return [i * len(dataset) // count for i in range(count)]


def normalised_batches(
    denoiser: Any, dataset: Any, stats: Any, indices: Sequence[int], size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Normalised clips (B, T, C, Y, X) and their actions, None for a model that takes none."""
    takes_actions = bool(denoiser.config.num_actions or denoiser.config.action_dim)
    for first in range(0, len(indices), size):
        frames, actions = collate([dataset[i] for i in indices[first : first + size]])
        yield (
            stats.normalize(frames.to(device)).contiguous(),
            actions.to(device) if actions is not None and takes_actions else None,
        )


def heldout_loss(
    denoiser: Any, dataset: Any, stats: Any, config: TrainConfig, *, clips: int = 8, batch_size: int = 4
) -> float:
    """The training loss (`loss` in the metrics) of clips that were not trained on, with the same noise at every call.

    Args:
        dataset: clips of config.clip_length frames; `clips` of them are used, spread evenly.
        config: of the training; its objective and noise levels are used.
    """
    device, total = next(denoiser.parameters()).device, 0.0
    indices = chosen_clips(dataset, clips)
    with evaluating(denoiser):
        for number, (x0, actions) in enumerate(
            normalised_batches(denoiser, dataset, stats, indices, batch_size, device)
        ):
            generator = torch.Generator().manual_seed(derive_seed(config.seed, HELDOUT, number))
            levels = draw_levels(config, denoiser, x0.shape[0], x0.shape[1], generator).to(device)
            seed = derive_seed(config.seed, HELDOUT, number, 1)
            _, losses = frame_losses(config, denoiser, x0, actions, levels, seed=seed)
            total += mean_loss(config, denoiser, losses.double()).item() * len(losses)
    return total / len(indices)
