"""A run on video: its data cut into clips, its network, its trainer, and the strips it shows while it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from .data import ClipDataset, FrameStats, open_dataset
from .devices import pick_device
from .media import write_png
from .model import Denoiser, ModelConfig
from .presets import ClipConfig, Preset, write_run_settings
from .rollout import continue_clips
from .train.trainer import Trainer


def open_clips(path: Path | str, clips: ClipConfig, model: ModelConfig, length: int, split: str) -> ClipDataset:
    """Clips at the model's size; latents and images of that size are left as they are."""

    def open_at(size: tuple[int, int] | None) -> ClipDataset:
        return open_dataset(
            path, length, size=size, frame_stride=clips.frame_stride, clip_stride=clips.clip_stride,
            on_error=clips.on_error, split=split, heldout_fraction=clips.heldout_fraction,
        )  # fmt: skip

    dataset = open_at(None)
    size = (model.height, model.width)
    return dataset if dataset.is_latent or dataset.frame_shape[:2] == size else open_at(size)


def fit_to_data(model: ModelConfig, dataset: ClipDataset) -> ModelConfig:
    """The model's border made to fit the data."""
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


def make_trainer(preset: Preset) -> Trainer:
    """Data, statistics, network and trainer of one run; writes run.json into its folder."""
    train, clips = preset.train, preset.clips
    pick_device(train.device)
    dataset = open_clips(
        train.data, clips, preset.model, train.clip_length, "train" if clips.heldout_fraction else "all"
    )
    torch.manual_seed(train.seed)
    model = Denoiser(fit_to_data(preset.model, dataset))
    on_sample = strip_writer(preset) if train.sample_every else None
    trainer = Trainer(train, model, dataset, FrameStats.estimate(dataset), on_sample=on_sample)
    if trainer.rank == 0:
        write_run_settings(Path(train.run_dir), preset)
    return trainer


def run_folder(path: Path) -> Path:
    """The run that a run folder or one of its checkpoints belongs to."""
    return path.parent if (path / "state.json").exists() else path


def strip_writer(preset: Preset, films: int = 2) -> Callable[[Trainer, int], None]:
    """Writes samples/step-*.png (recorded above generated) with the average of weights, and the same to TensorBoard."""
    length = preset.train.clip_length
    clips = dataclasses.replace(preset.clips, on_error="skip")

    def write(trainer: Trainer, step: int) -> None:
        model = trainer.model
        dataset = open_clips(trainer.config.data, clips, model.config, length, "heldout")
        given = max(1, length // 4)
        with trainer.ema_weights(trainer.config.ema_stds[0]):
            rollout = continue_clips(
                model,
                trainer.stats,
                [dataset[i] for i in spread(dataset, films)],
                length - given,
                preset.sampler,
                context=given,
            )
        folder = trainer.run_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        picture = rollout.strip(scale=2)
        write_png(folder / f"step-{step:07d}.png", picture)
        if trainer.reporter is not None:
            trainer.reporter.add_image("rollout", picture, step)

    return write
