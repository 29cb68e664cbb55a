"""Means over films and what they might have been: the bootstrap over groups of films (Efron 1979).

A table has a row for each film, with NaN where there is nothing to measure. Films of one group, clips of one episode,
are drawn together, since they are much alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95  # of the intervals
Estimate = dict[str, Any]  # value, low, high: numbers or lists of them, None where there is none


class Bootstrap:
    """How often each film is drawn, (RESAMPLES, N): the same for all tables, so that differences are paired.

    Args:
        groups: the group of each of N films; None is one group each.
        seed: of the draws.
    """

    def __init__(self, films: int, groups: Sequence[Any] | None = None, seed: int = 0) -> None:
        if groups is None:
            groups = range(films)
        if len(groups) != films or films < 1:
            raise ValueError(f"groups: must be one for each of {films} films, at least one, got {len(groups)}")
        names = list(dict.fromkeys(groups))
        which = np.array([names.index(group) for group in groups])
        drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
        counts = np.stack([np.bincount(row, minlength=len(names)) for row in drawn])
        self.groups = len(names)
        self.counts = counts[:, which].astype(np.float64)

    def means(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means over films of a table (N, ...), and of every resample (RESAMPLES, ...), leaving out NaN."""
        flat = table.reshape(len(table), -1).astype(np.float64)
        there = (~np.isnan(flat)).astype(np.float64)
        filled = np.nan_to_num(flat, nan=0.0)
        ones = np.ones((1, len(flat)))
        with np.errstate(invalid="ignore", divide="ignore"):
            value, drawn = ((w @ filled) / (w @ there) for w in (ones, self.counts))
        shape = table.shape[1:]
        return value.reshape(shape), drawn.reshape(RESAMPLES, *shape)

    def estimate(self, *tables: np.ndarray, of: Callable[..., np.ndarray] = lambda mean: mean) -> Estimate:
        """A function of the tables' means over films, for each column; tables (N, ...)."""
        return self._estimate(of, [self.means(table) for table in tables])

    def curve(self, *tables: np.ndarray, of: Callable[..., np.ndarray] = lambda mean: mean) -> dict[str, Estimate]:
        """{"all": over all films and columns, "by_horizon": for each column} of a function of the tables' means.

        Args:
            tables: (N, H) each; of: takes a mean of each.
        """
        alone = [self._pooled(table) for table in tables]
        return {"all": self._estimate(of, alone), "by_horizon": self.estimate(*tables, of=of)}

    def _pooled(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `means`, over all columns too; films with more columns to measure count for more."""
        there = (~np.isnan(table)).sum(1, dtype=np.float64)
        total = np.nansum(table, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(total.sum() / there.sum()), (self.counts @ total) / (self.counts @ there)

    def _estimate(self, of: Callable[..., np.ndarray], means: Sequence[tuple[np.ndarray, np.ndarray]]) -> Estimate:
        with np.errstate(invalid="ignore", divide="ignore"):
            value, drawn = of(*(m[0] for m in means)), of(*(m[1] for m in means))
        tail = (1 - LEVEL) / 2
        low, high = (_quantile(drawn, q) for q in (tail, 1 - tail))
        return {"value": plain(value), "low": plain(low), "high": plain(high)}


def _quantile(drawn: np.ndarray, q: float) -> np.ndarray:
    """Along the first axis, without interpolation, which infinity minus infinity would spoil; NaN is left out."""
    sorts, there = np.sort(drawn, axis=0), (~np.isnan(drawn)).sum(0)  # NaN last
    place = np.clip(np.round(q * (there - 1)).astype(int), 0, None)
    return np.take_along_axis(sorts, place[None], axis=0)[0]


def plain(value: Any) -> Any:
    """Numbers and arrays as JSON has them, None for NaN and infinity."""
    if np.ndim(value):
        return [plain(v) for v in value]
    return float(value) if np.isfinite(value) else None
