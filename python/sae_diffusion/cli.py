"""The command `sae`: collect | train | sample | schedule | series | images | info."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from .data import ClipDataset, FrameStats, collect, open_dataset
from .diffusion.plot import SchedulePlot
from .diffusion.sampler import SamplerConfig
from .diffusion.window_sampler import check_trained_for_window
from .images.cli import ImagesCommand
from .media import write_png
from .model import Denoiser, ModelConfig
from .presets import PRESETS, ClipConfig, Preset
from .rollout import continue_clips, films_from_nothing, random_actions
from .series.cli import SeriesCommand
from .train.checkpoint import load_denoiser
from .train.config import TrainConfig
from .train.trainer import Trainer

RUN_FILE = "run.json"  # in a run folder: how its clips were cut and its sampler, for `sae sample`
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)
OPTIONAL = (
    "gymnasium", "av", "pillow", "pyarrow", "safetensors", "scikit-learn", "torchdiffeq", "tyro", "rich", "tensorboard",
    "matplotlib", "ale-py",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Record episodes of a gymnasium environment as pictures and actions; running it again resumes.

    Args:
        out: folder to record into.
        env: any id with rgb_array rendering.
        episodes: how many the folder shall hold in the end.
        size: height and width of a recorded frame.
        frame_skip: environment steps between two recorded frames.
        hold: environment steps that the random policy keeps an action for.
        max_frames: cut episodes after so many frames.
        skip_first: environment steps played before recording begins.
        workers: processes.
        seed: of environments and actions.
        device: accepted for symmetry; environments run on the CPU.
        debug: show where an error came from.
    """

    out: Path
    env: str = "LunarLander-v3"
    episodes: int = 100
    size: tuple[int, int] = (64, 64)
    frame_skip: int = 2
    hold: int = 8
    max_frames: int | None = None
    skip_first: int = 0
    workers: int = 1
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        with progress_bar("collect", self.episodes, "episodes") as update:
            done = collect(
                self.env, self.out, episodes=self.episodes, size=self.size, seed=self.seed, frame_skip=self.frame_skip,
                hold=self.hold, max_frames=self.max_frames, skip_first=self.skip_first, num_workers=self.workers,
                progress=lambda count, total, frames: update(count, f"{frames} frames"),
            )  # fmt: skip
        print(f"{done.path}: {done.episodes} episodes, {done.frames} frames ({done.recorded} episodes new)")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a world model; the same command resumes, `torchrun -m sae_diffusion.cli train ...` uses several devices.

    Height, width, channels and actions of the model follow the data; images are resized to the preset's size.

    Args:
        preset: where the defaults of all options below come from.
        train: the run.
        model: the network.
        clips: how clips are cut from the data.
        sampler: for the strips written every --sample-every steps.
        debug: show where an error came from.
    """

    preset: str = "tiny"
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    debug: bool = False

    def run(self) -> None:
        if not self.train.data:
            raise ValueError("data: name the training data with --data FOLDER")
        trainer = make_trainer(Preset(self.model, self.train, self.sampler, self.clips))
        if trainer.rank == 0:
            skipped = len(trainer.dataset.skipped)
            print(
                f"{len(trainer.dataset)} clips of {self.train.clip_length} frames"
                + (f", {skipped} sources skipped" if skipped else "")
                + f"; {trainer.model.num_parameters() / 1e6:.2f} M parameters on {trainer.device}"
            )
        try:
            result = trainer.train()
        finally:
            trainer.close()
        if trainer.rank == 0:
            print(f"{result.checkpoint}: step {result.step}, stopped by: {result.reason}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Generate video with a trained model: continue held-out clips, or start from nothing.

    Writes rollout.gif, rollout.mp4 and strip.png.

    Args:
        run_dir: run folder or checkpoint.
        data: data to take context (and actions) from, held-out episodes only; none generates from nothing.
        out: folder to write into; <run_dir>/samples if not given.
        frames: new frames.
        context: given frames.
        samples: films side by side.
        actions: told to the model for new frames: those recorded, or random ones.
        hold: frames that a random action is kept for.
        window_frames: frames in flight at a time, each at its own noise level, for networks trained with --objective
            forcing; "None" finishes a frame before the next one begins.
        ema: relative width of the average of weights; "None" takes the weights as trained.
        guide: checkpoint of the weaker network of --guidance-kind auto.
        guide_ema: as --ema, for the guide.
        preset: where the sampler's defaults come from, if not from the run.
        sampler: the sampler.
        fps: of the written video.
        scale: enlargement of the pictures.
        seed: of noise and random actions.
        device: "auto" takes CUDA where there is one.
        debug: show where an error came from.
    """

    run_dir: Path
    data: Path | None = None
    out: Path | None = None
    frames: int = 28
    context: int = 4
    samples: int = 4
    actions: Literal["recorded", "random"] = "recorded"
    hold: int = 2
    window_frames: int | None = None
    ema: float | None = 0.05
    guide: Path | None = None
    guide_ema: float | None = 0.05
    preset: str | None = None
    sampler: Annotated[SamplerConfig, tyro.conf.arg(name="")] = field(default_factory=SamplerConfig)
    fps: float = 10.0
    scale: int = 4
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        for name in ("frames", "samples", "hold", "scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        device = pick_device(self.device)
        model, stats, *states = load_denoiser(self.run_dir, self.ema, device=device)
        guide = None
        if self.guide is not None:
            guide, _, state = load_denoiser(self.guide, self.guide_ema, device=device)
            states.append(state)
        if self.window_frames is not None:
            for state in states:
                check_trained_for_window(state)
        random = self.actions == "random" or self.data is None
        actions = random_actions(model, self.samples, self.frames, self.hold, self.seed) if random else None
        with progress_bar("sample", self.frames, "frames") as update:
            if self.data is None:
                rollout = films_from_nothing(
                    model, stats, self.samples, self.frames, self.sampler,
                    actions=actions, seed=self.seed, guide=guide, window_frames=self.window_frames, callback=update,
                )  # fmt: skip
            else:
                if self.context < 1:
                    raise ValueError(f"context: must be at least 1 with --data, got {self.context}")
                dataset = self.heldout(self.data, model, self.context if random else self.context + self.frames)
                clips = [dataset[i] for i in spread(dataset, self.samples)]
                rollout = continue_clips(
                    model, stats, clips, self.frames, self.sampler, context=self.context,
                    actions=actions[: len(clips)] if actions is not None else None,
                    recorded=not random, seed=self.seed, guide=guide, window_frames=self.window_frames,
                    callback=update,
                )  # fmt: skip
        run_dir = self.run_dir if not (self.run_dir / "state.json").exists() else self.run_dir.parent
        for path in rollout.write(self.out or run_dir / "samples", fps=self.fps, scale=self.scale):
            print(path)

    def heldout(self, data: Path, model: Denoiser, length: int) -> ClipDataset:
        """Clips cut as in training."""
        clips = ClipConfig(**run_settings(self.run_dir).get("clips", {}))
        return open_clips(data, dataclasses.replace(clips, on_error="skip"), model.config, length, "heldout")


@dataclass(frozen=True)
class Series:
    """Time series by per-token diffusion, from autoregressive to joint."""

    command: Annotated[SeriesCommand, tyro.conf.arg(name="")]

    def run(self) -> None:
        self.command.run()


@dataclass(frozen=True)
class Images:
    """Small images by diffusion in any orthonormal basis, with any schedule for each component."""

    command: Annotated[ImagesCommand, tyro.conf.arg(name="")]

    def run(self) -> None:
        self.command.run()


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print versions, devices, and which implementation each op takes here and why not the others.

    Args:
        json: print JSON.
        seed: accepted for symmetry.
        device: accepted for symmetry; all devices are listed.
        debug: show where an error came from.
    """

    json: bool = False
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        from sae_kernels.__main__ import format_report, report

        result = report()
        result["model layer"] = {package: package_version(package) for package in OPTIONAL}
        if self.json:
            print(json.dumps(result, indent=1))
            return
        print(format_report(result))
        print("\nmodel layer")
        for package, version in result["model layer"].items():
            print(f"{package:<12} {version}")


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def pick_device(name: str) -> torch.device:
    """Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is none ({str(error).splitlines()[0]})") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} is not here, {torch.cuda.device_count()} CUDA devices are")
    return device


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


def run_settings(path: Path) -> dict[str, Any]:
    """What run.json of a run folder, or of a checkpoint's, holds; empty where there is none."""
    for folder in (path, path.parent):
        if (folder / RUN_FILE).exists():
            return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    return {}


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
        Path(train.run_dir).mkdir(parents=True, exist_ok=True)
        settings = {"clips": dataclasses.asdict(clips), "sampler": dataclasses.asdict(preset.sampler)}
        (Path(train.run_dir) / RUN_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return trainer


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


@contextmanager
def progress_bar(name: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """A rich bar on stderr with rate and remaining time; yields update(done, note="")."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total, note="")
        yield lambda done, note="": progress.update(task, completed=done, note=note)


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option that sets the defaults of others, which --help shows, so it is looked for first."""
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments describe; exits with code 2 when they describe none."""
    name, run_dir = option(arguments, "--preset"), option(arguments, "--run-dir")
    if name is not None and name not in PRESETS:
        raise ValueError(f"preset: must be one of {', '.join(PRESETS)}, got {name!r}")
    preset = PRESETS[name or Train.preset]
    settings = run_settings(Path(run_dir)) if run_dir is not None and name is None else {}
    sampler = SamplerConfig(**settings["sampler"]) if "sampler" in settings else preset.sampler
    train = Train(train=preset.train, model=preset.model, clips=preset.clips, sampler=preset.sampler)
    # A required field has no default; tyro takes the mark for one.
    sample = dataclasses.replace(Sample(run_dir=Path()), run_dir=tyro.MISSING, sampler=sampler)
    commands = (
        Annotated[Collect, tyro.conf.subcommand("collect")]
        | Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Sample, tyro.conf.subcommand("sample", default=sample)]
        | Annotated[SchedulePlot, tyro.conf.subcommand("schedule")]
        | Annotated[Series, tyro.conf.subcommand("series")]
        | Annotated[Images, tyro.conf.subcommand("images")]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    return tyro.cli(commands, args=list(arguments), prog="sae", description="World models by autoregressive diffusion.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that a user can mend are one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments or bool(os.environ.get("SAE_DEBUG"))
    try:
        parse(arguments).run()
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"sae: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sae: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
