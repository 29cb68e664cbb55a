"""World models by autoregressive diffusion. `sae --version` prints the version."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from ._lazy import INSTALL
from .checks import Count, check_choice, check_fields
from .data.cli import DataCommand
from .diffusion.cli import SchedulePlot
from .diffusion.config import SamplerConfig
from .evaluation.cli import Evaluate
from .images.cli import ImagesCommand
from .model.config import ModelConfig
from .presets import PRESETS, ClipConfig, Preset, PresetName
from .progress import progress_bar
from .renamed import current_arguments
from .series.cli import SeriesCommand
from .settings import read_config, read_run_settings
from .train.config import TrainConfig

RANK_0_SECONDS = 10.0
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)
OPTIONAL = (
    "gymnasium", "av", "pillow", "pyarrow", "pyyaml", "safetensors", "scikit-learn", "torchdiffeq", "tyro", "rich",
    "tensorboard", "matplotlib", "ale-py",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Record episodes of a gymnasium environment as pictures and actions; running it again resumes.

    Args:
        out: folder to record into.
        env: any id with rgb_array rendering.
        episodes: how many the folder holds in the end.
        size: height and width of a recorded frame.
        frame_skip: environment steps between two recorded frames.
        hold: environment steps that the random policy keeps an action for.
        max_frames: cut episodes after this many frames.
        skip_first: environment steps played before recording begins.
        workers: processes.
        seed: of environments and actions.
        device: accepted for consistency; environments run on the CPU.
        debug: show the traceback of an error.
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
        from .data import Timing, collect

        timing = Timing(self.frame_skip, self.hold, self.skip_first, self.max_frames)
        with progress_bar("collect", self.episodes, "episodes") as bar:
            done = collect(
                self.env, self.out, episodes=self.episodes, size=self.size, seed=self.seed, timing=timing,
                num_workers=self.workers,
                progress=lambda count, total, frames: bar.update(count, f"{frames} frames"),
            )  # fmt: skip
        print(f"{done.path}: {done.episodes} episodes, {done.frames} frames ({done.recorded} episodes new)")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a world model. The same command resumes; `torchrun -m sae_diffusion train ...` uses several devices.

    The model's height, width, channels and actions follow the data; images are resized to the preset's size. All
    settings are written to config.yaml in the run folder, with which --config repeats the run.

    Args:
        config: YAML file of options, nested as they are here: those without a dot at the top, `--model.window 8` as
            `model: {window: 8}`. The command line overrides the file, and the file overrides the preset.
        preset: sets the defaults of all options below.
        train: the run.
        model: the network.
        clips: how clips are cut from the data.
        sampler: for the strips written every --sample-every steps.
        dry_run: open the data, say what would be trained, measure the memory and time of a step, and stop; writes
            nothing.
        debug: show the traceback of an error.
    """

    config: Path | None = None
    preset: PresetName = "tiny"
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    dry_run: bool = False
    debug: bool = False

    def run(self) -> None:
        if not self.train.data:
            raise ValueError("data: must name the training data, as in --data FOLDER, got none")
        from .runs import make_trainer, open_run

        settings = Preset(self.model, self.train, self.sampler, self.clips)
        if self.dry_run:
            from .dry_run import measure

            parts = open_run(settings)
            needs = measure(self.train, parts.model, parts.dataset, parts.stats)
            if os.environ.get("RANK", "0") == "0":
                self.introduce(parts.model, parts.dataset, needs.device, needs.precision)
                for line in needs.lines():
                    print(line)
            return
        trainer = make_trainer(settings, self.preset)
        if trainer.rank == 0:
            self.introduce(trainer.model, trainer.dataset, trainer.device, trainer.precision)
        try:
            result = trainer.train()
        finally:
            trainer.close()
        if trainer.rank == 0:
            print(f"{result.checkpoint}: step {result.step}, stopped by: {result.reason}")

    def introduce(self, model: Any, data: Any, device: Any, precision: str) -> None:
        """Print what will be trained, and on what."""
        from .runs import skipped_sources

        for line in skipped_sources(data):
            print(line, file=sys.stderr)
        if not data.others:
            print(
                f"warning: none of {len(data.episodes)} episodes is held out (--clips.heldout-fraction "
                f"{self.clips.heldout_fraction:g}): learning cannot be told from memorising, and `sae sample` will "
                "continue clips that the network was trained on",
                file=sys.stderr,
            )
        print(
            f"{len(data)} clips of {self.train.clip_length} frames"
            + (f", {len(data.skipped)} sources skipped" if data.skipped else "")
            + f"; {model.num_parameters() / 1e6:.2f} M parameters on {device} in {precision}"
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Generate video with a trained model: continue held-out clips, or start from nothing.

    Writes rollout.gif, rollout.mp4 and strip.png.

    Args:
        run_dir: run folder or checkpoint.
        pretrained: a network that comes with the package, in place of --run-dir; it continues its own held-out clips if
            --data names no others, and writes into runs/<name>/samples.
        data: folder or file that context (and actions) come from; "None" generates from nothing.
        split: episodes to continue: "heldout", "train" or "all"; "None" takes held-out ones, or all if none is held
            out or --data is one file.
        out: folder to write into; "None": <run_dir>/samples.
        npz: another file to write: arrays `recorded` and `generated` (N, T, Y, X, C) as on disk, uint8 for images, and
            `context`, the number of given frames at their start.
        frames: new frames, fewer if the clips of the data are shorter; "None": 28, or one per row of --actions.
        context: frames given to each video.
        samples: how many videos.
        actions: of the new frames: "recorded", "random", or a file (.npy, .csv or .json, a row for each new frame)
            whose actions are used in all videos.
        hold: frames for which a random action is kept.
        in_flight: frames that are generated together, each at its own noise level, for networks trained with
            --objective forcing; "None" finishes each frame before it begins the next.
        ema: relative width of the average of weights; "None" takes the weights as trained.
        guide: checkpoint of the weaker network for --guidance-kind auto.
        guide_ema: as --ema, for the guide.
        preset: sets the sampler's defaults, in place of the run.
        sampler: the sampler.
        fps: of the written video.
        scale: factor by which the pictures are enlarged.
        seed: of noise and random actions.
        device: "auto" takes CUDA where there is one.
        debug: show the traceback of an error.
    """

    run_dir: Path
    pretrained: str | None = None
    data: Path | None = None
    split: Literal["heldout", "train", "all"] | None = None
    out: Path | None = None
    npz: Path | None = None
    frames: Count | None = None
    context: Count = 4
    samples: Count = 4
    actions: str = "recorded"
    hold: Count = 2
    in_flight: int | None = None
    ema: float | None = 0.05
    guide: Path | None = None
    guide_ema: float | None = 0.05
    preset: PresetName | None = None
    sampler: Annotated[SamplerConfig, tyro.conf.arg(name="")] = field(default_factory=SamplerConfig)
    fps: float = 10.0
    scale: Count = 4
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        check_fields(self)
        file = None if self.actions in ("recorded", "random") else Path(self.actions)
        if file is not None and not file.is_file():
            raise ValueError(f"actions: must be recorded, random or a file, got {self.actions!r}")
        kind = self.sampler.guidance_kind
        if kind != "auto" if self.guide is not None else kind == "auto" and self.sampler.guidance != 1:
            raise ValueError(
                "guide: --guide CHECKPOINT and --guidance-kind auto go together, "
                f"got --guide {self.guide} and --guidance-kind {kind}"
            )
        from .devices import pick_device
        from .diffusion.sampler import check_independent_levels
        from .media import fit_grid
        from .rollout import continue_clips, random_actions, videos_from_nothing
        from .runs import choose_clips, given_actions, run_folder
        from .train.checkpoint import load_denoiser

        device = pick_device(self.device)
        model, stats, *states = load_denoiser(self.run_dir, self.ema, device=device)
        guide = None
        if self.guide is not None:
            guide, _, state = load_denoiser(self.guide, self.guide_ema, device=device)
            states.append(state)
        if self.in_flight is not None:
            for state in states:
                check_independent_levels(state)
        actions = None if file is None else given_actions(file, model.config)
        frames = self.frames or (28 if actions is None else len(actions))
        if actions is not None and len(actions) < frames:
            raise ValueError(f"actions: {file} must have a row for each of {frames} frames, got {len(actions)}")
        clips, videos, context = [], self.samples, 0
        if self.data is not None:
            settings = read_run_settings(self.run_dir)
            chosen = choose_clips(
                self.data, settings[0] if settings else ClipConfig(), model.config, samples=self.samples,
                context=self.context, frames=frames, split=self.split, recorded=self.actions == "recorded",
            )  # fmt: skip
            for note in chosen.notes:
                print(f"note: {note}", file=sys.stderr)
            clips, videos, context, frames = chosen.clips, len(chosen.clips), chosen.context, chosen.frames
        if actions is not None:
            actions = actions[None, :frames].expand(videos, *([-1] * actions.ndim))
        elif self.data is None or self.actions == "random":
            actions = random_actions(model, videos, frames, self.hold, self.seed)
        recorded = self.data is not None and chosen.recorded
        fit_grid(videos, (model.config.height, model.config.width), ["generated"] * (1 + recorded), self.scale)
        with progress_bar("sample", frames, "frames") as bar:
            options: dict[str, Any] = {
                "actions": actions, "seed": self.seed, "guide": guide, "in_flight": self.in_flight,
                "callback": bar.update,
            }  # fmt: skip
            if clips:
                rollout = continue_clips(
                    model, stats, clips, frames, self.sampler, context=context, recorded=recorded, **options
                )
            else:
                rollout = videos_from_nothing(model, stats, videos, frames, self.sampler, **options)
        if self.npz is not None:
            rollout.save(self.npz)
            print(self.npz)
        for path in rollout.write(self.out or run_folder(self.run_dir) / "samples", fps=self.fps, scale=self.scale):
            print(path)


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
    """Print versions, devices, and which implementation each op uses here and why not the others.

    Args:
        json: print the report as JSON.
        seed: accepted for consistency.
        device: accepted for consistency; all devices are listed.
        debug: show the traceback of an error.
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


def version() -> str:
    """Version of both packages, read from the file: importing sae_kernels would import torch."""
    spec = importlib.util.find_spec("sae_kernels")
    text = Path(str(spec.origin if spec else "")).read_text(encoding="utf-8")
    return text.rpartition('__version__ = "')[2].partition('"')[0]


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of an option that sets other options' defaults, which --help shows: so it must be found first."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            value = arguments[i + 1]
        if argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments describe; exits with code 2 if they are wrong."""
    arguments = current_arguments(arguments)
    command = arguments[0] if arguments else ""
    name, run_dir = cast(PresetName | None, option(arguments, "--preset")), option(arguments, "--run-dir")
    given: dict[str, Any] = {}
    if command in ("sample", "evaluate") and (pretrained := option(arguments, "--pretrained")) is not None:
        from .pretrained import pretrained_folder

        folder = pretrained_folder(pretrained)
        if run_dir is not None:
            raise ValueError(f"pretrained: must not be given with --run-dir, got {pretrained} and {run_dir}")
        out = Path("runs", pretrained, "samples" if command == "sample" else "evaluation")
        given = {"run_dir": folder, "data": folder / "data", "out": out, "ema": None}
        run_dir = str(folder)
    if name is not None:
        check_choice("preset", name, tuple(PRESETS))
    chosen, preset = name or Train.preset, PRESETS[name or Train.preset]
    settings = None
    if command == "train" and (file := option(arguments, "--config")) is not None:
        chosen, preset = read_config(file, preset=name, default=Train.preset)
    elif command in ("sample", "evaluate") and run_dir is not None and name is None:
        settings = read_run_settings(Path(run_dir))
    sampler = settings[1] if settings else preset.sampler
    train = Train(preset=chosen, train=preset.train, model=preset.model, clips=preset.clips, sampler=preset.sampler)
    # Marks a required field, which has no default.
    sample = dataclasses.replace(Sample(run_dir=Path()), sampler=sampler, **({"run_dir": tyro.MISSING} | given))
    evaluate = Evaluate(sampler=sampler, **given)
    commands = (
        Annotated[Collect, tyro.conf.subcommand("collect")]
        | Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Sample, tyro.conf.subcommand("sample", default=sample)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate", default=evaluate)]
        | Annotated[SchedulePlot, tyro.conf.subcommand("schedule")]
        | Annotated[DataCommand, tyro.conf.subcommand("data")]
        | Annotated[Series, tyro.conf.subcommand("series")]
        | Annotated[Images, tyro.conf.subcommand("images")]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    return tyro.cli(commands, args=arguments, prog="sae", description=__doc__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an error that the user can fix is one line on stderr and exit code 2.

    Exit code 1 is a finding of the command, such as bad data.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"sae {version()}")
        return 0
    debug = "--debug" in arguments or bool(os.environ.get("SAE_DEBUG"))
    try:
        code = parse(arguments).run() or 0
    except USER_ERRORS as error:
        if debug:
            raise
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0]
        hint = f"; {INSTALL}" if missing else ""
        if os.environ.get("RANK", "0") != "0":
            # An error of all ranks is printed by rank 0, and torchrun ends the others; one of this rank alone, here.
            time.sleep(RANK_0_SECONDS)
        print(f"sae: {' '.join(str(error).split()) or type(error).__name__}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sae: interrupted", file=sys.stderr)
        return 130
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
