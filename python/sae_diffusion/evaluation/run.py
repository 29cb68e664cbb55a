"""The whole evaluation of a trained network, or of films alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.format import DataError, read_description
from ..diffusion.config import SamplerConfig
from ..presets import ClipConfig
from ..rollout import Rollout, continue_clips
from ..runs import Continuation, choose_clips
from .config import EvaluationConfig
from .films import evaluate_films
from .objects import Object, parse_colour


@dataclass(frozen=True)
class Evaluation:
    """What was measured, as JSON has it, and the films it was measured on."""

    numbers: dict[str, Any]
    films: Rollout


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
    """Everything about a network: films that continue recorded clips, and what they say.

    Args:
        data, clips, split: where the clips come from, as `choose_clips` takes them.
        in_flight: of `generate`.
        callback: called with the share of the work that is done, and what is being done.

    Raises:
        ValueError: nothing to continue, or latents, which are no pictures.
    """
    say = callback or (lambda share, what: None)
    wanted = wanted_object(config, data)
    chosen = films_to_continue(data, clips, model.config, config, split)
    if stats.latent:
        raise ValueError(f"data: {data} holds latents; decode the films of `sae sample --npz` and evaluate those")
    films = continue_clips(
        model, stats, chosen.clips, chosen.frames, sampler, context=chosen.context, seed=config.seed,
        in_flight=in_flight, callback=lambda done: say(0.9 * done / chosen.frames, "films"),
    )  # fmt: skip
    groups = [episode_of(clip.source) for clip in chosen.clips]
    measured = evaluate_films(
        films, wanted=wanted, groups=groups, seed=config.seed, callback=lambda done: say(0.9 + 0.1 * done, "metrics")
    )
    notes = [*chosen.notes, *measured.pop("notes")]
    return Evaluation({"films": measured, "notes": notes}, films)
