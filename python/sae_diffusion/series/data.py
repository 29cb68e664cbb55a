"""Series to train on: generators whose laws are known, and files of your own.

Everything here is numpy float64 of shape (count, length, channels), and a function of its arguments and seed only.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checks import Count, Fraction, InnerFraction, check_value
from ..diffusion.noise import derive_seed
from .orders import CHAINS, check_order

if TYPE_CHECKING:
    from .config import Source

LOGISTIC_RATE = 3.993
MIXTURE_RATE = 3.9993


def gen(n: int, chaos_ratio: float = 0.5, *, seed: int = 0) -> np.ndarray:
    """One series of the chaos-ratio mixture, (n,): see `gen_dataset`."""
    return gen_dataset(1, n, chaos_ratio, seed=seed)[0, :, 0]


def gen_dataset(count: int, n: int, chaos_ratio: float = 0.5, *, seed: int = 0) -> np.ndarray:
    """`count` series y = chaos_ratio * l + (1 - chaos_ratio) * noise, (count, n, 1).

    l_0 ~ U(0, 1), l_{k+1} = 3.9993 l_k (1 - l_k); noise = N(0, 1) per point plus one N(0, 1) per series (its mean).
    A larger count begins with the series of a smaller one.

    Raises:
        ValueError: count or n is below 1, or chaos_ratio is outside [0, 1].
    """
    check_value("count", count, Count)
    check_value("n", n, Count)
    check_value("chaos_ratio", chaos_ratio, Fraction)
    l = np.empty((count, n))
    l[:, 0] = np.random.default_rng(derive_seed(seed, 0)).random(count)
    for k in range(n - 1):
        l[:, k + 1] = MIXTURE_RATE * l[:, k] * (1 - l[:, k])
    normal = np.random.default_rng(derive_seed(seed, 1)).standard_normal((count, n + 1))
    noise = normal[:, :n] + normal[:, n:]
    return (chaos_ratio * l + (1 - chaos_ratio) * noise)[:, :, None]


def permutation(order: str, length: int, step: int = 1, seed: int = 0) -> np.ndarray:
    """Position of every link of a chain: position perm[k] follows from position perm[k - 1]. (length,) int64.

    "natural" 0, 1, 2, ...; "backward" the reverse; "swaps" exchanges first and last of each whole block of `step`
    positions (step 1 = natural); "block-shuffle" applies one random permutation with about half of all inversions to
    each block of `step`; "shuffled" is a random permutation of all positions.

    Raises:
        ValueError: an unknown order, a step outside [1, length], or for block-shuffle one that does not divide length.
    """
    check_order(order, length, step)
    perm = np.arange(length)
    if order == "backward":
        return perm[::-1].copy()
    if order == "swaps":
        for first in range(0, length - step + 1, step):
            last = first + step - 1
            perm[first], perm[last] = perm[last], perm[first]
    elif order == "block-shuffle":
        block = _half_inverted(step, np.random.default_rng(derive_seed(seed, 2)))
        perm = (np.arange(0, length, step)[:, None] + block).reshape(-1)
    elif order == "shuffled":
        perm = np.random.default_rng(derive_seed(seed, 3)).permutation(length)
    return perm


def _half_inverted(size: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation with 40-60 % of all inversions; sizes 2 and 3 have none such, so just above half."""
    most = size * (size - 1) // 2
    while True:
        block = rng.permutation(size)
        inversions = sum(int((block[:i] > block[i]).sum()) for i in range(size))
        if 0.4 * most <= inversions <= max(0.6 * most, -(-most // 2)):
            return block


def draw_series(source: Source, count: int, seed: int) -> np.ndarray:
    """`count` series of a source, (count, length, 1); a larger count begins with the series of a smaller one."""
    check_value("count", count, Count)
    if source.kind == "mixture":
        return gen_dataset(count, source.length, source.chaos_ratio, seed=seed)
    if source.kind == "white-noise":
        normal = np.random.default_rng(derive_seed(seed, 0)).standard_normal((count, source.length))
        return normal[:, :, None]
    perm = source.permutation()
    draws = np.random.default_rng(derive_seed(seed, 0)).random((count, source.length))
    x = np.empty((count, source.length))
    x[:, perm[0]] = draws[:, 0]
    for k in range(1, source.length):
        p = x[:, perm[k - 1]]
        if source.kind == "logistic":
            x[:, perm[k]] = LOGISTIC_RATE * p * (1 - p)
        elif source.kind == "stochastic":
            x[:, perm[k]] = p + (draws[:, k] < 0.5)
        else:
            x[:, perm[k]] = 1 - p
    return x[:, :, None]


def clause_error(source: Source, x: np.ndarray) -> np.ndarray:
    """Squared violation of the chain's law, summed over its length - 1 links: (count, length, 1) -> (count,).

    For "stochastic" a link costs min(d², (d - 1)²), d the increment.

    Raises:
        ValueError: the source has no clauses, or x has another shape.
    """
    if not source.has_clauses:
        raise ValueError(f"kind: must be one of {', '.join(CHAINS)} to have clauses, got {source.kind!r}")
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 3 or x.shape[1:] != (source.length, 1):
        raise ValueError(f"x: must have shape (count, {source.length}, 1), got {x.shape}")
    links = x[:, source.permutation(), 0]
    p, following = links[:, :-1], links[:, 1:]
    if source.kind == "logistic":
        error = (LOGISTIC_RATE * p * (1 - p) - following) ** 2
    elif source.kind == "stochastic":
        error = np.minimum((following - p) ** 2, (following - p - 1) ** 2)
    else:
        error = (1 - p - following) ** 2
    return error.sum(axis=1)


@dataclass(frozen=True, eq=False)
class SeriesStats:
    """Mean and standard deviation per position and channel, (length, channels) float64.

    A position that never varies gets std 1.
    """

    mean: np.ndarray
    std: np.ndarray

    @staticmethod
    def estimate(x: np.ndarray) -> SeriesStats:
        std = x.std(axis=0)
        return SeriesStats(x.mean(axis=0), np.where(std > 0, std, 1.0))

    def normalize(self, x: np.ndarray) -> torch.Tensor:
        """(..., length, channels) in data units -> float32 tensor with mean 0, std 1 per position."""
        return torch.from_numpy(((x - self.mean) / self.std).astype(np.float32))

    def denormalize(self, x: torch.Tensor) -> np.ndarray:
        return x.detach().cpu().double().numpy() * self.std + self.mean

    @property
    def log_det(self) -> float:
        """Sum of log std: log p(data units) = log p(normalised) - log_det, nats per series."""
        return float(np.log(self.std).sum())

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> SeriesStats:
        return SeriesStats(np.asarray(values["mean"], np.float64), np.asarray(values["std"], np.float64))


def read_series(
    path: str | Path, *, key: str = "series", series_column: str = "series", time_column: str = "time"
) -> np.ndarray:
    """Series of a .csv, .parquet or .npz file, (count, length, channels) float64.

    .npz: the array `key`, or the only array, of shape (count, length, channels) or (count, length).
    .csv (with a header line), .parquet: *long* if it has the columns `series_column` and `time_column`: a row per
        point, sorted here by time within a series, every further column a channel; series in order of appearance.
        *Wide* if it has neither: a row per series, a column per point, one channel.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, ragged series, missing or repeated points, a column that is not a number,
            NaN or infinite values, wrong dimensions; the message names file, place and rule.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".npz":
        x = _read_npz(path, key)
    elif path.suffix in (".csv", ".parquet"):
        x = _read_table(path, series_column, time_column)
    else:
        raise ValueError(f"{path}: must end in .csv, .parquet or .npz")
    if 0 in x.shape:
        raise ValueError(f"{path}: must hold at least one series, point and channel, got shape {x.shape}")
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        s, t, c = bad[0]
        raise ValueError(
            f"{path}: values must be finite, got {x[s, t, c]} in series {s}, point {t}, channel {c} "
            f"({len(bad)} such values); drop or fill them first"
        )
    return x


def _read_npz(path: Path, key: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.keys())
            name = key if key in names else names[0] if len(names) == 1 else None
            if name is None:
                found = ", ".join(names) or "none"
                raise ValueError(f"{path}: must hold an array {key!r} or a single one, got {found}")
            x = file[name]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: cannot be read as npz; ragged (object) arrays are refused ({error})") from error
    if x.dtype.kind not in "fiub":
        raise ValueError(f"{path}: array {name!r} must hold real numbers, got {x.dtype}")
    if x.ndim == 2:
        x = x[:, :, None]
    if x.ndim != 3:
        raise ValueError(f"{path}: array {name!r} must have shape (count, length, channels), got {x.shape}")
    return x.astype(np.float64)


def _read_table(path: Path, series_column: str, time_column: str) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = pa.csv.read_csv(path) if path.suffix == ".csv" else pa.parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: cannot be read; every row must have the header's columns ({error})") from error
    names = table.column_names
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: column names must differ, got {', '.join(names)}")
    found = [name for name in (series_column, time_column) if name in names]
    if len(found) == 1:
        raise ValueError(
            f"{path}: the long format needs columns {series_column!r} and {time_column!r}, the wide one neither; "
            f"got {found[0]!r} only"
        )
    if not found:
        _refuse_headerless(path, names)
        return np.stack([_numbers(path, table, name) for name in names], axis=1)[:, :, None]
    channels = [name for name in names if name not in found]
    if not channels:
        raise ValueError(f"{path}: must have a column of values beside {series_column!r} and {time_column!r}")
    values = np.stack([_numbers(path, table, name) for name in channels], axis=1)
    owners: list[Any] = table.column(series_column).to_pylist()
    rank = {name: i for i, name in enumerate(dict.fromkeys(owners))}
    owner = np.array([rank[name] for name in owners], dtype=np.int64)
    time = table.column(time_column)
    for name in found:
        if missing := table.column(name).null_count:
            raise ValueError(f"{path}: column {name!r} must have no missing values, got {missing}")
    kind, time = time.type, time.to_numpy()
    if time.dtype.kind not in "iufM":
        raise ValueError(f"{path}: column {time_column!r} must hold numbers or timestamps, got {kind}")
    lengths = np.bincount(owner, minlength=len(rank))
    labels = list(rank)
    if len(set(lengths.tolist())) > 1:
        short, long = int(lengths.argmin()), int(lengths.argmax())
        raise ValueError(
            f"{path}: ragged: all series must have the same length, got {lengths[short]} points in series "
            f"{labels[short]!r} and {lengths[long]} in series {labels[long]!r}"
        )
    order = np.lexsort((time, owner))
    sorted_time = time[order].reshape(len(rank), -1)
    repeated = np.argwhere(sorted_time[:, 1:] == sorted_time[:, :-1])
    if len(repeated):
        s, t = repeated[0]
        found_at = f"{time_column} {sorted_time[s, t]}"
        raise ValueError(f"{path}: series {labels[s]!r} must have one point at each time, got two at {found_at}")
    return values[order].reshape(len(rank), -1, len(channels))


def _refuse_headerless(path: Path, names: list[str]) -> None:
    """A header of numbers other than positions is a first row of data, not a header."""
    try:
        header = [float(name) for name in names]
    except ValueError:
        return
    if header not in (list(range(len(names))), list(range(1, len(names) + 1))):
        raise ValueError(f"{path}: must begin with a header line, got the numbers {', '.join(names[:4])}, ...")


def _numbers(path: Path, table: Any, name: str) -> np.ndarray:
    import pyarrow as pa

    column = table.column(name)
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"{path}: column {name!r} must hold numbers, got {kind}")
    return column.to_numpy().astype(np.float64)


def split_series(x: np.ndarray, heldout_fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(train, held out): a random split of whole series, at least one in each.

    Raises:
        ValueError: the fraction is outside (0, 1), or there are fewer than two series.
    """
    check_value("heldout_fraction", heldout_fraction, InnerFraction)
    if len(x) < 2:
        raise ValueError(f"x: must hold at least two series to hold one out, got {len(x)}")
    count = min(max(round(len(x) * heldout_fraction), 1), len(x) - 1)
    order = np.random.default_rng(derive_seed(seed, 4)).permutation(len(x))
    return x[np.sort(order[count:])], x[np.sort(order[:count])]
