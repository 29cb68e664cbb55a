"""`make demo`: show the trained model of the package; record LunarLander, train the tiny model for some minutes on the
CPU, and show what that has learned.

Everything is in the output folder, which is also a run folder for `sae train` and `sae sample`. Running it again
continues where it stopped: what was recorded and trained is kept, and the rest of the time budget is used.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from .cli import USER_ERRORS
from .data import ClipDataset, Timing, collect
from .disk import write_json
from .evaluation.config import EvaluationConfig
from .evaluation.report import show, write_evaluation
from .evaluation.run import Evaluation, evaluate_run
from .figures import new_figure, save_figure
from .presets import PRESETS, Preset
from .pretrained import load_pretrained, pretrained_folder
from .progress import progress_bar
from .rollout import Rollout, continue_clips
from .runs import make_trainer, open_clips
from .settings import CONFIG_FILE, read_config
from .train.checkpoint import latest_checkpoint, load_denoiser, read_state, versions

METRICS = "metrics.json"
CURVE = "metrics.jsonl"


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo.

    Args:
        out: folder for everything.
        pretrained: the model of the package that is shown first; "None" shows none.
        env: gymnasium environment.
        episodes: recorded, a tenth of them held out.
        frame_skip: environment steps between two frames; 4 gives 12.5 frames a second, at which motion is visible.
        hold: environment steps that the random policy keeps an action for.
        seconds: of training in total.
        context: frames given to each continuation.
        frames: frames generated in each continuation.
        videos: number of continuations.
        eval_clips: held-out clips that are continued to be measured.
        drift_frames: of the long films that drift is measured on.
        ema: relative width of the average of weights that is sampled and measured.
        seed: of recording, training and sampling.
        device: for training and sampling.
        workers: recording processes.
        debug: show the traceback of an error.
    """

    out: Path = Path("runs/demo")
    pretrained: str | None = "lunar-lander"
    env: str = "LunarLander-v3"
    episodes: int = 120
    frame_skip: int = 4
    hold: int = 8
    seconds: float = 500.0
    context: int = 4
    frames: int = 14
    videos: Annotated[int, tyro.conf.arg(aliases=["--films"])] = 4  # the older name
    eval_clips: int = 32
    drift_frames: int = 64
    ema: float = 0.05
    seed: int = 0
    device: str = "cpu"
    workers: int = 2
    debug: bool = False


def run(config: DemoConfig, preset: Preset) -> dict[str, Any]:
    """Run the demo; returns what it wrote to metrics.json."""
    config.out.mkdir(parents=True, exist_ok=True)
    preset = dataclasses.replace(
        preset,
        train=dataclasses.replace(
            preset.train, data=str(config.out / "data"), run_dir=str(config.out), seed=config.seed, device=config.device
        ),
    )
    seconds: dict[str, float] = {}
    if config.pretrained is not None:
        with stage("pretrained", seconds):
            for picture in show_pretrained(config, config.pretrained):
                print(picture)
    with stage("record", seconds):
        recorded = record(config, preset)
    print(f"{recorded.episodes} episodes, {recorded.frames} frames of {config.env} in {recorded.path}")
    with stage("train", seconds):
        train(config, preset)
    model, stats, state = load_denoiser(config.out, config.ema, device=config.device)
    heldout = open_clips(preset.train.data, preset.clips, model.config, preset.train.clip_length, "heldout")
    with stage("sample", seconds):
        clips = dataclasses.replace(preset.clips, clip_stride=1)
        dataset = open_clips(preset.train.data, clips, model.config, config.context + config.frames, "heldout")
        rollout, fps = continuations(config, dataset, preset, model, stats)
        paths = rollout.write(config.out, fps=fps)
    with stage("evaluate", seconds):
        evaluation = measure(config, preset, model, stats)
    paths += write_evaluation(config.out / "evaluation", evaluation)
    paths.append(loss_curve(config.out))
    metrics = {
        "environment": config.env,
        "episodes": recorded.episodes,
        "frames": recorded.frames,
        "heldout_episodes": len(heldout.episodes),
        "parameters": model.num_parameters(),
        "steps": state["step"],
        "clips_seen": state["clips_seen"],
        "train_seconds": state["seconds"],
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "device": config.device,
        "versions": versions(),
        "evaluation": evaluation.numbers,
    }
    write_json(config.out / METRICS, metrics)
    show(evaluation.numbers)
    for path in (*paths, latest_checkpoint(config.out), config.out / METRICS):
        print(path)
    return metrics


def show_pretrained(config: DemoConfig, name: str) -> list[Path]:
    """The first pictures: what a trained model makes of episodes it has not seen. Returns where they are."""
    folder = pretrained_folder(name)
    model, stats, _ = load_pretrained(name, device=config.device)
    settings = read_config(folder / CONFIG_FILE)[1]
    dataset = open_clips(folder / "data", settings.clips, model.config, config.context + config.frames, "heldout")
    rollout, fps = continuations(config, dataset, settings, model, stats)
    return rollout.write(config.out / name, fps=fps)


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"== {name}", flush=True)
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 1)


def record(config: DemoConfig, preset: Preset) -> Any:
    with progress_bar("record", config.episodes, "episodes") as bar:
        return collect(
            config.env, preset.train.data, episodes=config.episodes, seed=config.seed,
            timing=Timing(config.frame_skip, config.hold), size=(preset.model.height, preset.model.width),
            num_workers=min(config.workers, os.cpu_count() or 1),
            progress=lambda count, total, frames: bar.update(count),
        )  # fmt: skip


def train(config: DemoConfig, preset: Preset) -> None:
    """Train for what is left of the time budget, if anything."""
    latest = latest_checkpoint(config.out)
    spent = read_state(latest)["seconds"] if latest else 0.0
    if latest and (config.seconds - spent < 1 or read_state(latest)["step"] >= preset.train.steps):
        print(f"already trained: {latest}")
        return
    trainer = make_trainer(
        dataclasses.replace(preset, train=dataclasses.replace(preset.train, max_seconds=config.seconds - spent))
    )
    print(
        f"{trainer.model.num_parameters() / 1e6:.2f} M parameters, {len(trainer.dataset)} clips, "
        f"{config.seconds - spent:.0f} seconds on {torch.get_num_threads()} threads in {trainer.precision}"
    )
    result = trainer.train()
    if result.reason.startswith("SIG"):
        raise KeyboardInterrupt


def continuations(
    config: DemoConfig, dataset: ClipDataset, preset: Preset, model: Any, stats: Any
) -> tuple[Rollout, float]:
    """The last frames of episodes, generated from the first few of them and the recorded actions."""
    ends = last_clips(dataset)[: config.videos]
    with progress_bar("sample", config.frames, "frames") as bar:
        rollout = continue_clips(
            model, stats, [dataset[i] for i in ends], config.frames, preset.sampler,
            context=config.context, seed=config.seed, callback=bar.update,
        )  # fmt: skip
    return rollout, dataset.fps or 10.0


def measure(config: DemoConfig, preset: Preset, model: Any, stats: Any) -> Evaluation:
    """What `sae evaluate` measures, on fewer and shorter films."""
    what = EvaluationConfig(
        samples=config.eval_clips, frames=config.frames, context=config.context, loss_clips=8,
        drift_frames=config.drift_frames, drift_samples=4, seed=config.seed,
    )  # fmt: skip
    with progress_bar("evaluate", 100, "%") as bar:
        return evaluate_run(
            model, stats, Path(preset.train.data), preset.clips, preset.sampler, what,
            callback=lambda share, part: bar.update(100 * share, part),
        )  # fmt: skip


def last_clips(dataset: ClipDataset) -> list[int]:
    """The index of each episode's last clip."""
    ends = {dataset.locate(i)[0].source: i for i in range(len(dataset))}
    return list(ends.values())


def loss_curve(folder: Path) -> Path:
    """Write loss.png, the weighted training loss over clips seen."""
    # runs begun before the metrics had a readable "loss" call it "weighted_loss"
    records = [json.loads(line) for line in (folder / CURVE).read_text(encoding="utf-8").splitlines()]
    figure, (axes,) = new_figure(7, 4)
    axes.plot([r["clips"] for r in records], [r.get("weighted_loss", r.get("loss")) for r in records])
    axes.set(xlabel="clips seen", ylabel="weighted denoising loss", yscale="log", title="training")
    axes.grid(which="both", alpha=0.3)
    return save_figure(figure, folder / "loss.png")


def main() -> int:
    config = tyro.cli(DemoConfig, prog="python -m sae_diffusion.demo", description=__doc__)
    try:
        run(config, PRESETS["tiny"])
    except USER_ERRORS as error:
        if config.debug:
            raise
        print(f"demo: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; the same command continues from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
