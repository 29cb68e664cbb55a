"""Generating series, and measuring a network: how well its series obey the law, and how likely held-out ones are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..checks import Count, check_value
from ..diffusion.noise import derive_seed
from ..diffusion.schedules import Given, Schedule, sampling_times, scales_of
from ..diffusion.solvers import sample, start
from .config import Source
from .data import SeriesStats
from .model import SeriesDenoiser


def generate(
    model: SeriesDenoiser,
    stats: SeriesStats,
    schedule: Schedule,
    count: int,
    *,
    steps: int = 400,
    solver: str = "ancestral",
    eta: float = 0.0,
    seed: int = 0,
    batch: int = 256,
    given: np.ndarray | None = None,
    callback: Callable[[int], None] | None = None,
) -> np.ndarray:
    """`count` new series in data units, (count, length, channels) float64.

    Args:
        steps: of the solver over the whole schedule; a token moves during window / (length - 1 + window) of them.
        solver, eta: see `sae_diffusion.diffusion.solvers.sample`.
        batch: series at once; the result depends on it, because noise is numbered within a batch.
        given: the first points of each series, (count, points, channels) in data units, which generation continues.
        callback: called with the number of solver steps done, of ceil(count / batch) * steps.

    Raises:
        ValueError: count, steps or batch below 1, an unknown solver, or `given` of another shape or not finite.
    """
    for name, value in (("count", count), ("steps", steps), ("batch", batch)):
        check_value(name, value, Count)
    times = sampling_times(schedule, steps)
    known = 0
    if given is not None:
        known = _check_given(given, count, model)
        schedule = Given(schedule, torch.arange(model.length) < known)
    device = next(model.parameters()).device
    made = []
    for number, first in enumerate(range(0, count, batch)):
        shape = (min(batch, count - first), model.length, model.channels)
        own = derive_seed(seed, number)

        def report(i: int, *_: object, done: int = number * steps) -> None:
            if callback is not None:
                callback(done + i + 1)

        x = start(shape, schedule, seed=own, device=device)
        if given is not None:
            # known points have the least noise of the schedule, as in training
            signal, noise = (s.item() for s in scales_of(schedule.log_snr(times[-1:])[0, 0], schedule.scaling))
            own_part = given[first : first + batch]
            clean = SeriesStats(stats.mean[:known], stats.std[:known]).normalize(own_part).to(x)
            x[:, :known] = signal * clean + noise * x[:, :known]
        x = sample(model, x, schedule, times, solver=solver, eta=eta, seed=own, callback=report)
        new = stats.denormalize(x)
        if given is not None:
            new[:, :known] = own_part
        made.append(new)
    return np.concatenate(made)


def _check_given(given: np.ndarray, count: int, model: SeriesDenoiser) -> int:
    """The number of given points."""
    fits = given.ndim == 3 and 0 < given.shape[1] < model.length and given.shape[::2] == (count, model.channels)
    if not fits or not np.isfinite(given).all():
        wanted = f"({count}, 1 to {model.length - 1}, {model.channels})"
        raise ValueError(f"given: must be finite, of shape {wanted}, got {given.shape}")
    return given.shape[1]


def error_quartiles(source: Source, x: np.ndarray) -> dict[str, float]:
    """Quartiles of the clause error over series x (count, length, 1): {"q25", "median", "q75"}."""
    low, median, high = np.quantile(source.clause_error(x), [0.25, 0.5, 0.75])
    return {"q25": float(low), "median": float(median), "q75": float(high)}


def negative_log_likelihood(
    model: SeriesDenoiser,
    stats: SeriesStats,
    schedule: Schedule,
    x: np.ndarray,
    *,
    divergence: str = "exact",
    seed: int = 0,
    batch: int = 64,
    tolerance: float = 1e-4,
    data_end: str = "smoothed",
    callback: Callable[[float], None] | None = None,
) -> np.ndarray:
    """-log p of each series in data units, nats (count,); for held-out series, not the network's own.

    The density is that of the data with the schedule's least noise added (data_end="smoothed"), or a bound on that of
    the data itself ("bound"), see `sae_diffusion.diffusion.likelihood`. The change of units adds the sum of
    the logarithms of `stats.std`. `callback` is called with the number of series done, parts of a batch included.
    """
    from ..diffusion.likelihood import log_likelihood

    z = stats.normalize(x).to(next(model.parameters()).device)
    values = []
    for number, part in enumerate(z.split(batch)):

        def report(t: float, done: int = number * batch, size: int = len(part)) -> None:
            if callback is not None:
                callback(done + t * size)

        log_p = log_likelihood(
            model, part, schedule, divergence=divergence, seed=derive_seed(seed, number), tolerance=tolerance,
            data_end=data_end, callback=report,
        )  # fmt: skip
        values.append(log_p.detach())
    return stats.log_det - torch.cat(values).cpu().double().numpy()
