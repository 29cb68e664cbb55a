"""The whole evaluation of a trained network, or of films alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Clip
from ..data.format import DataError, read_description
from ..diffusion.config import SamplerConfig
from ..diffusion.steps import CORRECTED
from ..presets import ClipConfig
from ..rollout import Rollout, continue_clips
from ..runs import Continuation, choose_clips
from ..train.evaluate import chosen_clips
from .config import EvaluationConfig
from .drift import drift_films, drift_tables, marks_of, summarise_drift
from .films import evaluate_films
from .intervals import Bootstrap
from .losses import SIGMAS, denoising_errors, summarise_errors
from .objects import Object, parse_colour


@dataclass(frozen=True)
class Evaluation:
    """What was measured, as JSON has it, and the films it was measured on."""

    numbers: dict[str, Any]
    films: Rollout
    long: Rollout | None = None  # films of drift


def default_colour(data: Path) -> str | None:
    """The object that is followed in data of `collect` where nothing else is said."""
    try:
        environment = str(read_description(data)["env_id"])
    except (DataError, KeyError):
        return None
    return "lunar-lander" if environment.startswith("LunarLander") else None


def wanted_object(config: EvaluationConfig, data: Path | None) -> Object | None:
    """What is looked for in frames of `data`."""
    colour = config.object_colour or (None if data is None else default_colour(data))
    return None if colour is None else Object(parse_colour(colour), config.object_side, config.object_within)


def films_to_continue(
    data: Path, clips: ClipConfig, model: Any, config: EvaluationConfig, split: str | None
) -> Continuation:
    """The recorded clips behind the films.

    Raises:
        ValueError: there are none that new frames could be compared with.
    """
    chosen = choose_clips(
        data, clips, model, samples=config.samples, context=config.context, frames=config.frames, split=split,
        recorded=True,
    )  # fmt: skip
    if not chosen.recorded:
        raise ValueError(f"data: {data} must have clips of {config.context} + {config.frames} frames to compare with")
    return chosen


def episode_of(source: str) -> str:
    """What a clip was cut from: its source without the number of its first frame."""
    return source.rpartition(", frame ")[0] or source


def evaluate_run(
    model: Any, stats: Any, data: Path, clips: ClipConfig, sampler: SamplerConfig, config: EvaluationConfig, *,
    split: str | None = None, in_flight: int | None = None, callback: Callable[[float, str], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Everything about a network: films that continue recorded clips and what they say, denoising errors, and drift.

    Args:
        data, clips, split: where the clips come from, as `choose_clips` takes them.
        in_flight: of `generate`.
        callback: called with the share of the work that is done, and what is being done.

    Raises:
        ValueError: nothing to continue.
    """
    wanted = wanted_object(config, data)
    chosen = films_to_continue(data, clips, model.config, config, split)
    evaluations = sampler.sampling_steps * (2 if sampler.solver in CORRECTED else 1) + 1
    block = model.config.frames_per_block
    loss_frames = max(config.loss_frames // block, 2) * block
    work = _Work(
        {
            "films": len(chosen.clips) * chosen.frames * evaluations,
            "metrics": len(chosen.clips) * chosen.frames,
            "errors": min(config.loss_clips, len(chosen.clips)) * loss_frames * len(SIGMAS) * 8,
            "drift": config.drift_samples * config.drift_frames * evaluations,
        },
        callback,
    )
    films = continue_clips(
        model, stats, chosen.clips, chosen.frames, sampler, context=chosen.context, seed=config.seed,
        in_flight=in_flight, callback=lambda done: work.report("films", done / chosen.frames),
    )  # fmt: skip
    episodes, notes = [episode_of(clip.source) for clip in chosen.clips], list(chosen.notes)
    numbers: dict[str, Any] = {"films": None, "errors": None, "drift": None}
    if stats.latent:
        notes.append("films of latents are not measured: decode those of --npz, and evaluate them with --films")
    else:
        numbers["films"] = evaluate_films(
            films, wanted=wanted, groups=episodes, seed=config.seed,
            callback=lambda done: work.report("metrics", done),
        )  # fmt: skip
        notes += numbers["films"].pop("notes")
    if config.loss_clips:
        short = [_first_frames(clip, loss_frames) for clip in chosen.clips]
        errors = denoising_errors(
            model, short, stats, clips=config.loss_clips, context_sigma=sampler.context_sigma, seed=config.seed,
            callback=lambda done: work.report("errors", done),
        )  # fmt: skip
        bootstrap = Bootstrap(
            len(errors["copy"]), [episodes[i] for i in chosen_clips(short, config.loss_clips)], config.seed
        )
        numbers["errors"] = summarise_errors(errors, SIGMAS, block, bootstrap)
    long = None
    if config.drift_frames and not stats.latent:
        long, sources = drift_films(
            model, stats, data, clips, sampler, config, split=split, in_flight=in_flight,
            callback=lambda done: work.report("drift", done / config.drift_frames),
        )  # fmt: skip
        marks = marks_of(long.frames.shape[1] - long.context)
        found = numbers["films"]["object"]
        tables = (
            drift_tables(long.frames, long.context, marks)
            if found is None
            else drift_tables(long.frames, long.context, marks, wanted, found["typical_mass"])
        )
        bootstrap = Bootstrap(len(long.frames), [episode_of(source) for source in sources], config.seed)
        numbers["drift"] = {"actions": config.drift_actions, **summarise_drift(tables, marks, bootstrap)}
    return Evaluation({**numbers, "notes": notes}, films, long)


def _first_frames(clip: Clip, frames: int) -> Clip:
    actions = None if clip.actions is None else clip.actions[:frames]
    return dataclasses.replace(clip, frames=clip.frames[:frames], actions=actions)


class _Work:
    """Says which share of all work is done, from the share that is done of one part; parts come in their order."""

    def __init__(self, amounts: dict[str, int], callback: Callable[[float, str], None] | None) -> None:
        self.amounts, self.callback = amounts, callback

    def report(self, part: str, share: float) -> None:
        if self.callback is not None:
            names = list(self.amounts)
            before = sum(self.amounts[name] for name in names[: names.index(part)])
            self.callback((before + share * self.amounts[part]) / sum(self.amounts.values()), part)
