"""What is left of a film after hundreds of frames: its background, its sharpness and the object.

The background of a camera at rest is what it was in the last given frame: bright pixels there (LunarLander's terrain)
should stay as they were, and so should dark ones (its sky), but where the object hides them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..diffusion.config import SamplerConfig
from ..presets import ClipConfig
from ..rollout import Rollout, continue_clips, random_actions, stack_actions
from ..runs import choose_clips
from .config import EvaluationConfig
from .intervals import Bootstrap
from .objects import Object, count, find, presence
from .pictures import psnr

MARKS = (16, 64, 256)
BRIGHT, DARK = 192, 63  # least and most of all channels
COVERED = 0.1  # presence from which on a pixel, and those around it, are the object's


def drift_films(
    model: Any, stats: Any, data: Path, clips: ClipConfig, sampler: SamplerConfig, config: EvaluationConfig,
    *, split: str | None, **options: Any,
) -> tuple[Rollout, list[str]]:  # fmt: skip
    """Long films, and the sources of their clips.

    With config.drift_actions "recorded" the recorded actions are told as long as they last, then random ones.

    Args:
        options: of `generate`.
    """
    block = model.config.frames_per_block
    frames = max(config.drift_frames // block, 1) * block
    recorded = config.drift_actions == "recorded"
    chosen = choose_clips(
        data, clips, model.config, samples=config.drift_samples, context=config.context, frames=frames, split=split,
        recorded=recorded,
    )  # fmt: skip
    actions = random_actions(model, len(chosen.clips), frames, config.hold, config.seed)
    told = stack_actions(chosen.clips)
    if recorded and chosen.recorded and actions is not None and told is not None:
        known = told[:, chosen.context :].to(actions.dtype)
        actions = torch.cat([known, actions[:, known.shape[1] :]], dim=1)
    films = continue_clips(
        model, stats, chosen.clips, frames, sampler, context=chosen.context, recorded=False, actions=actions,
        seed=config.seed, **options,
    )  # fmt: skip
    return films, [clip.source for clip in chosen.clips]


def drift_tables(
    frames: np.ndarray, context: int, marks: list[int], wanted: Object | None = None, typical: float = float("nan")
) -> dict[str, np.ndarray]:
    """Tables (N, len(marks)), NaN where there is nothing to measure, of films (N, T, Y, X, C) uint8.

    Args:
        marks: numbers of new frames, from 1.
        wanted, typical: the object and its mass; without them `objects` is NaN.

    Returns:
        frame, terrain and sky: mean squared errors against the last given frame; sky_level: root mean square of the
        sky's grey levels; detail: root mean square of the differences between neighbours, over that of the last given
        frame; objects: their number, of films that begin with one.
    """
    start, later = frames[:, context - 1].astype(np.float64), frames[:, [context - 1 + m for m in marks]]
    x = later.astype(np.float64)
    error = np.square(x - start[:, None]).mean(-1)
    hidden = np.zeros(error.shape, bool)
    objects = np.full(error.shape[:2], np.nan)
    if wanted is not None:
        hidden = _grown(presence(later, wanted) > COVERED * wanted.split()[2])
        begins = find(frames[:, context - 1], wanted).detected(typical)
        objects[begins] = count(later[begins], wanted, typical)
    terrain = (start.min(-1) >= BRIGHT)[:, None] & ~hidden
    sky = (start.max(-1) <= DARK)[:, None] & ~hidden
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "frame": error.mean((-2, -1)),
            "terrain": _mean(error, terrain),
            "sky": _mean(error, sky),
            "sky_level": np.sqrt(_mean(np.square(x).mean(-1), sky)),
            "detail": _detail(x) / _detail(start)[:, None],
            "objects": objects,
        }


def summarise_drift(tables: dict[str, np.ndarray], marks: list[int], bootstrap: Bootstrap) -> dict[str, Any]:
    """Means over films at each mark with their intervals, as JSON has them."""
    decibels = {f"{name}_psnr": bootstrap.estimate(tables[name], of=psnr) for name in ("frame", "terrain", "sky")}
    plain = {name: bootstrap.estimate(tables[name]) for name in ("sky_level", "detail", "objects")}
    return {"at": marks, "films": len(tables["frame"]), "groups": bootstrap.groups, **decibels, **plain}


def marks_of(frames: int) -> list[int]:
    """The marks that so many new frames reach, and the last frame where they reach none."""
    return [mark for mark in MARKS if mark <= frames] or [frames]


def _mean(x: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Over the pixels where a condition holds; NaN where it holds nowhere."""
    return (x * where).sum((-2, -1)) / where.sum((-2, -1))


def _detail(x: np.ndarray) -> np.ndarray:
    right, down = np.diff(x, axis=-2), np.diff(x, axis=-3)
    return np.sqrt(np.square(right).mean((-3, -2, -1)) + np.square(down).mean((-3, -2, -1)))


def _grown(mask: np.ndarray) -> np.ndarray:
    """With the eight pixels around each."""
    padded = np.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(1, 1), (1, 1)])
    height, width = mask.shape[-2:]
    shifts = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.logical_or.reduce(shifts)


def shown_at(films: Rollout, marks: list[int]) -> Rollout:
    """The last given frame and those at the marks, for a picture."""
    places = [films.context - 1, *(films.context - 1 + m for m in marks)]
    return dataclasses.replace(films, frames=films.frames[:, places], truth=None, context=1)
