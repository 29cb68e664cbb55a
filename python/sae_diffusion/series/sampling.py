"""Generating series, and judging a network: how well its series obey the law, how likely it finds held-out ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..diffusion.noise import derive_seed
from ..diffusion.schedules import Schedule, sampling_times
from ..diffusion.solvers import sample, start
from .data import SeriesStats, Source
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
    callback: Callable[[int], None] | None = None,
) -> np.ndarray:
    """`count` new series in data units, (count, length, channels) float64.

    Args:
        steps: of the solver over the whole schedule; a token moves during window / (length - 1 + window) of them.
        solver, eta: see `sae_diffusion.diffusion.solvers.sample`.
        batch: series at once; the result depends on it, because noise is counted within a batch.
        callback: called with the number of solver steps done, of ceil(count / batch) * steps.

    Raises:
        ValueError: count, steps or batch below 1, or an unknown solver.
    """
    for name, value in (("count", count), ("steps", steps), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    times = sampling_times(schedule, steps)
    device = next(model.parameters()).device
    made = []
    for number, first in enumerate(range(0, count, batch)):
        shape = (min(batch, count - first), model.length, model.channels)
        own = derive_seed(seed, number)

        def report(i: int, *_: object, done: int = number * steps) -> None:
            if callback is not None:
                callback(done + i + 1)

        x = start(shape, schedule, seed=own, device=device)
        x = sample(model, x, schedule, times, solver=solver, eta=eta, seed=own, callback=report)
        made.append(stats.denormalize(x))
    return np.concatenate(made)


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
    rtol: float = 1e-4,
    atol: float = 1e-4,
    data_end: str = "smoothed",
) -> np.ndarray:
    """-log p of each series in data units, nats (count,): of held-out series, never of the network's own.

    The density is that of the data with the schedule's least noise on them (data_end="smoothed"), or a bound on
    that of the data themselves ("bound"), see `sae_diffusion.diffusion.likelihood`. The change of units adds the sum of
    the logarithms of `stats.std`.
    """
    from ..diffusion.likelihood import log_likelihood

    z = stats.normalize(x).to(next(model.parameters()).device)
    values = []
    for number, part in enumerate(z.split(batch)):
        log_p = log_likelihood(
            model, part, schedule, divergence=divergence, seed=derive_seed(seed, number), rtol=rtol, atol=atol,
            data_end=data_end,
        )  # fmt: skip
        values.append(log_p.detach())
    return stats.log_det - torch.cat(values).cpu().double().numpy()
