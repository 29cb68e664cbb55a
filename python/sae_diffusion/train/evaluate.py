"""Measurements on held-out clips: denoising loss by noise level and by context, and one-step prediction."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..data import collate
from ..diffusion.loss import loss_weight
from ..diffusion.noise import derive_seed
from ..diffusion.sampler import SamplerConfig, generate
from .config import TrainConfig
from .objectives import draw_levels, frame_losses, mean_loss

HELDOUT = 100  # purpose of derived seeds, apart from those of training


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _spread(dataset: Any, clips: int) -> list[int]:
    """Indices of up to `clips` clips, spread evenly over the data set."""
    count = min(clips, len(dataset))
    if count < 1:
        raise ValueError(f"clips, dataset: must be at least one clip, got {clips} of {len(dataset)}")
    return [i * len(dataset) // count for i in range(count)]


def _batches(
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


def validate(
    denoiser: Any,
    dataset: Any,
    stats: Any,
    sigmas: Sequence[float] = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0),
    *,
    clips: int = 16,
    batch_size: int = 4,
    context_sigma: float = 0.05,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Held-out denoising loss by noise level, with the whole past, with the last block only, and with no past.

    Without a past, the block is shown as the first one of a clip, a case that every training clip has. All three see
    the same noisy frames (noise is a function of the seed, the level and the clip's place in the selection) and are
    averaged over the same frames: all but the first block, which has no past. Context frames have no noise and are
    labelled context_sigma, as at inference.

    Args:
        denoiser: a `Denoiser`.
        clips: how many, spread evenly over the data set, each of at least two blocks.

    Returns:
        {"sigma": [...], "full_context": [...], "last_frame": [...], "no_context": [...]}, losses weighted by
        `loss_weight`: on white data the best linear estimate has loss 1.

    Raises:
        ValueError: clips shorter than two blocks.
    """
    config = denoiser.config
    device = next(denoiser.parameters()).device
    block = config.frames_per_block
    indices = _spread(dataset, clips)
    totals = torch.zeros(3, len(sigmas), dtype=torch.float64, device=device)
    with _evaluating(denoiser):
        seen = 0
        for x0, actions in _batches(denoiser, dataset, stats, indices, batch_size, device):
            batch, frames = x0.shape[:2]
            if frames < 2 * block:
                raise ValueError(f"dataset: clips must have at least two blocks = {2 * block} frames, got {frames}")
            for level, sigma in enumerate(sigmas):
                noise = []
                for place in range(seen, seen + batch):
                    generator = torch.Generator().manual_seed(derive_seed(seed, level, place))
                    noise.append(torch.randn(x0.shape[1:], generator=generator))
                noisy = x0 + sigma * torch.stack(noise).to(device)
                estimates = (
                    _with_past(denoiser, x0, noisy, actions, sigma, context_sigma)[:, block:],
                    _by_block(denoiser, x0, noisy, actions, sigma, context_sigma, block, past=block),
                    _by_block(denoiser, x0, noisy, actions, sigma, context_sigma, block, past=0),
                )
                for row, estimate in enumerate(estimates):
                    error = (estimate.double() - x0[:, block:].double()).square().mean(dim=(1, 2, 3, 4)).sum()
                    totals[row, level] += error * loss_weight(torch.tensor(float(sigma)), config.sigma_data).item()
            seen += batch
    full, last, none = (totals / len(indices)).tolist()
    return {"sigma": [float(s) for s in sigmas], "full_context": full, "last_frame": last, "no_context": none}


def heldout_loss(
    denoiser: Any, dataset: Any, stats: Any, config: TrainConfig, *, clips: int = 8, batch_size: int = 4
) -> float:
    """The training loss (`loss` in the metrics) of clips that were not trained on, with the same noise at every call.

    Args:
        dataset: clips of config.clip_length frames; `clips` of them are used, spread evenly.
        config: of the training; its objective and noise levels are used.
    """
    device, total = next(denoiser.parameters()).device, 0.0
    indices = _spread(dataset, clips)
    with _evaluating(denoiser):
        for number, (x0, actions) in enumerate(_batches(denoiser, dataset, stats, indices, batch_size, device)):
            generator = torch.Generator().manual_seed(derive_seed(config.seed, HELDOUT, number))
            levels = draw_levels(config, denoiser, x0.shape[0], x0.shape[1], generator).to(device)
            seed = derive_seed(config.seed, HELDOUT, number, 1)
            _, losses = frame_losses(config, denoiser, x0, actions, levels, seed=seed)
            total += mean_loss(config, denoiser, losses.double()).item() * len(losses)
    return total / len(indices)


def _with_past(
    denoiser: Any,
    x0: torch.Tensor,
    noisy: torch.Tensor,
    actions: torch.Tensor | None,
    sigma: float,
    context_sigma: float,
) -> torch.Tensor:
    batch, frames = x0.shape[:2]
    levels = torch.cat([x0.new_full((batch, frames), context_sigma), x0.new_full((batch, frames), sigma)], dim=1)
    return denoiser(torch.cat([x0, noisy], dim=1), levels, actions, noisy_copies=1)[:, frames:]


def _by_block(
    denoiser: Any,
    x0: torch.Tensor,
    noisy: torch.Tensor,
    actions: torch.Tensor | None,
    sigma: float,
    context_sigma: float,
    block: int,
    past: int,
) -> torch.Tensor:
    """D of each block after the first, as the last block of a clip that begins `past` frames before it."""
    parts = []
    for start in range(block, x0.shape[1], block):
        piece = slice(start - past, start + block)
        told = None if actions is None else actions[:, piece]
        parts.append(_with_past(denoiser, x0[:, piece], noisy[:, piece], told, sigma, context_sigma)[:, past:])
    return torch.cat(parts, dim=1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images; infinite for equal ones."""
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def one_step_psnr(
    denoiser: Any,
    dataset: Any,
    stats: Any,
    config: SamplerConfig | None = None,
    *,
    clips: int = 16,
    batch_size: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """How well a clip's last block is predicted from its other frames, compared with repeating the last of those.

    PSNR in dB over all pixels of all clips, uint8 as recorded.

    Returns:
        {"generated": ..., "copy_last_frame": ..., "clips": n}.

    Raises:
        ValueError: the data set holds latents, or clips shorter than two blocks.
    """
    block = denoiser.config.frames_per_block
    indices = _spread(dataset, clips)
    device = next(denoiser.parameters()).device
    generated, copied, truth = [], [], []
    with _evaluating(denoiser):
        for number, (x0, actions) in enumerate(_batches(denoiser, dataset, stats, indices, batch_size, device)):
            # the last whole block is the target
            given = (x0.shape[1] // block - 1) * block
            if given < 1:
                wanted = f"two blocks = {2 * block} frames"
                raise ValueError(f"dataset: clips must have at least {wanted}, got {x0.shape[1]}")
            told = None if actions is None else actions[:, : given + block]
            x = generate(denoiser, x0[:, :given], told, block, config, seed=derive_seed(seed, number))
            pictures = [stats.denormalize(t).cpu() for t in (x, x0[:, given - 1 : given], x0[:, given : given + block])]
            if pictures[0].dtype != torch.uint8:
                raise ValueError(f"dataset: must hold images (uint8) for a PSNR, got {pictures[0].dtype}")
            generated.append(pictures[0])
            copied.append(pictures[1].expand_as(pictures[2]))
            truth.append(pictures[2])
    true = torch.cat(truth)
    return {
        "generated": psnr(torch.cat(generated), true),
        "copy_last_frame": psnr(torch.cat(copied), true),
        "clips": len(indices),
    }
