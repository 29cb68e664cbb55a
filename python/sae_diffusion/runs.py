"""A run on video: its clips, its network, its trainer, and the strips that it writes while it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .data import Clip, ClipDataset, FrameStats, open_dataset
from .data.actions import read_actions
from .data.dataset import is_heldout
from .data.episodes import Episode
from .devices import pick_device
from .media import write_png
from .model import Denoiser, ModelConfig
from .presets import ClipConfig, Preset, PresetName
from .rollout import continue_clips
from .settings import CONFIG_FILE, write_config
from .train.trainer import Trainer


def open_clips(path: Path | str, clips: ClipConfig, model: ModelConfig, length: int, split: str) -> ClipDataset:
    """Clips at the model's size: images of another size are resized, latents are left as they are."""

    def open_at(size: tuple[int, int] | None) -> ClipDataset:
        return open_dataset(
            path, length, size=size, frame_stride=clips.frame_stride, clip_stride=clips.clip_stride,
            on_error=clips.on_error, split=split, heldout_fraction=clips.heldout_fraction,
        )  # fmt: skip

    dataset = open_at(None)
    size = (model.height, model.width)
    return dataset if dataset.is_latent or dataset.frame_shape[:2] == size else open_at(size)


def fit_to_data(model: ModelConfig, dataset: ClipDataset) -> ModelConfig:
    """The model with the size, channels and actions of the data."""
    height, width, channels = dataset.frame_shape
    return dataclasses.replace(
        model,
        height=height,
        width=width,
        channels=channels,
        num_actions=dataset.num_actions,
        action_dim=dataset.action_dim,
    )


def spread(dataset: ClipDataset, count: int) -> list[int]:
    """Indices of up to `count` clips, evenly over the data set."""
    count = min(count, len(dataset))
    return [i * len(dataset) // count for i in range(count)]


@dataclass(frozen=True)
class Parts:
    """The parts of a run; `heldout` are clips that are not trained on."""

    model: Denoiser
    dataset: ClipDataset
    stats: FrameStats
    heldout: ClipDataset | None


def open_run(preset: Preset) -> Parts:
    """Open the data and make the network for it."""
    train, clips = preset.train, preset.clips
    pick_device(train.device)
    dataset = open_clips(
        train.data, clips, preset.model, train.clip_length, "train" if clips.heldout_fraction else "all"
    )
    stats, config = FrameStats.estimate(dataset), fit_to_data(preset.model, dataset)
    if config.prior == "previous-frame":
        config = dataclasses.replace(config, change_std=stats.change_std(dataset))
    torch.manual_seed(train.seed)
    model = Denoiser(config)
    others = [episode for episode in dataset.others if dataset.frames_of(episode) >= train.clip_length]
    heldout = dataset.cut(train.clip_length, others) if others else None
    return Parts(model, dataset, stats, heldout)


def make_trainer(preset: Preset, name: PresetName = "tiny") -> Trainer:
    """The trainer of a run; writes config.yaml into its folder.

    Args:
        name: of the preset that `preset` was made from, for config.yaml.
    """
    parts, train = open_run(preset), preset.train
    on_sample = strip_writer(preset) if train.sample_every else None
    trainer = Trainer(train, parts.model, parts.dataset, parts.stats, on_sample=on_sample, heldout=parts.heldout)
    if trainer.rank == 0:
        fitted = dataclasses.replace(preset, model=parts.model.config)
        write_config(Path(train.run_dir) / CONFIG_FILE, name, fitted)
    return trainer


def skipped_sources(dataset: ClipDataset, most: int = 20) -> list[str]:
    """A line for each skipped source, with the reason; beyond `most` of them, only how many more."""
    lines = [f"skipped {source}: {reason}" for source, reason in dataset.skipped]
    return lines[:most] + ([f"and {len(lines) - most} more were skipped"] if len(lines) > most else [])


@dataclass(frozen=True)
class Continuation:
    """What `sae sample` continues.

    Attributes:
        clips: of `context` given frames and, where `recorded`, of the `frames` that followed them.
        notes: messages about what differs from the request.
    """

    clips: list[Clip]
    context: int
    frames: int
    recorded: bool
    notes: list[str]


def choose_clips(
    path: Path, clips: ClipConfig, model: ModelConfig, *, samples: int, context: int, frames: int, split: str | None,
    recorded: bool,
) -> Continuation:  # fmt: skip
    """Clips of `path` to continue: as requested or, where the data has less, what it has.

    Args:
        samples: number of clips; fewer if the data has fewer.
        context, frames: given and new frames; for shorter clips first fewer new ones, then fewer given ones.
        split: None takes held-out episodes, or all if none is held out or `path` is one file.
        recorded: also take the frames that followed, for their actions and for comparison.

    Raises:
        ValueError: nothing to continue.
    """
    everything = open_clips(path, dataclasses.replace(clips, on_error="skip"), model, 1, "all")
    notes = skipped_sources(everything)
    episodes: dict[str, list[Episode]] = {"all": everything.episodes, "train": [], "heldout": []}
    for episode in everything.episodes:
        episodes["heldout" if is_heldout(episode.identity, clips.heldout_fraction) else "train"].append(episode)
    if split is None:
        split = "all" if path.is_file() or not episodes["heldout"] else "heldout"
        if split == "all" and path.is_dir():
            notes.append(
                f"{path}: none of {len(everything.episodes)} episodes is held out, so the videos may continue clips "
                "that the network was trained on"
            )
    if not episodes[split]:
        raise ValueError(f"split: {split!r} must have episodes, got none of the {len(everything.episodes)} in {path}")
    _check_kind(everything.num_actions, everything.action_dim, model, path)
    block = model.frames_per_block
    lengths = sorted((everything.frames_of(episode) for episode in episodes[split]), reverse=True)
    enough = any(length >= context + frames for length in lengths) and (
        len(everything.cut(context + frames, episodes[split])) >= samples
    )
    # so that each video continues an episode of its own, rather than the longest one
    longest = context + frames if enough else min(context + frames, lengths[min(samples, len(lengths)) - 1])
    if longest < context + frames and recorded and not (model.num_actions or model.action_dim):
        recorded = False
        notes.append(f"{path}: clips of {longest} frames are too short to compare {context} + {frames} with")
    wanted = (context, frames)
    if recorded and longest < context + frames:
        frames = max((longest - context) // block, 1) * block
    context = min(context, (longest - (frames if recorded else 0)) // block * block)
    if context < 1:
        least = block + recorded * frames
        raise ValueError(f"data: clips of {path} must have at least {least} frames, got {longest} in the longest")
    if (context, frames) != wanted:
        notes.append(
            f"{path}: clips have {longest} frames, so {context} are given and {frames} generated instead of "
            f"{wanted[0]} and {wanted[1]}; --actions random generates any number"
        )
    dataset = everything.cut(context + recorded * frames, episodes[split])
    if len(dataset) < samples:
        notes.append(f"{path}: {len(dataset)} videos instead of {samples}, as there are no more clips")
    chosen = [dataset[i] for i in spread(dataset, samples)]
    return Continuation(chosen, context, frames, recorded, notes)


def given_actions(path: Path, model: ModelConfig) -> torch.Tensor:
    """The actions in a file, (N,) int64 or (N, A) float32, row i causing the i-th new frame.

    Raises:
        ValueError: they are not of the kind that the network was trained with.
    """
    rows = read_actions(path)
    if not (model.num_actions or model.action_dim):
        raise ValueError(f"actions: must be None for a network without actions, got {path}")
    discrete, dim = (int(rows.max()) + 1, 0) if rows.ndim == 1 else (0, rows.shape[1])
    _check_kind(discrete, dim, model, path)
    return torch.from_numpy(rows)


def _check_kind(num_actions: int, action_dim: int, model: ModelConfig, path: Path) -> None:
    """Check that the network takes the actions of `path`, unless there are none or it takes none."""

    def say(discrete: int, dim: int) -> str:
        return f"{discrete} discrete actions" if discrete else f"actions of {dim} numbers"

    if not ((num_actions or action_dim) and (model.num_actions or model.action_dim)):
        return
    if num_actions > model.num_actions or action_dim != model.action_dim:
        raise ValueError(
            f"actions: must be {say(model.num_actions, model.action_dim)}, as the network was trained with, "
            f"got {say(num_actions, action_dim)} in {path}"
        )


def run_folder(path: Path) -> Path:
    """The run that a run folder or one of its checkpoints belongs to."""
    return path.parent if (path / "state.json").exists() else path


def strip_writer(preset: Preset, videos: int = 2) -> Callable[[Trainer, int], None]:
    """Writes samples/step-*.png (recorded above generated), generated with averaged weights, and to TensorBoard."""
    length = preset.train.clip_length

    def write(trainer: Trainer, step: int) -> None:
        model, block = trainer.model, preset.model.frames_per_block
        given = max(1, length // 4 // block) * block
        chosen = choose_clips(
            Path(trainer.config.data), preset.clips, model.config, samples=videos, context=given,
            frames=(length - given) // block * block, split=None, recorded=True,
        )  # fmt: skip
        with trainer.ema_weights(trainer.config.ema_stds[0]):
            rollout = continue_clips(
                model, trainer.stats, chosen.clips, chosen.frames, preset.sampler,
                context=chosen.context, recorded=chosen.recorded,
            )  # fmt: skip
        folder = trainer.run_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        picture = rollout.strip(scale=2)
        write_png(folder / f"step-{step:07d}.png", picture)
        if trainer.reporter is not None:
            trainer.reporter.add_image("rollout", picture, step)

    return write
