"""What films say by themselves: generated frames against recorded ones, both against repeating the last given frame.

N films of T frames, the first `context` of them given, H = T - context generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..rollout import Rollout
from .features import frame_features, frechet_distance
from .intervals import Bootstrap
from .objects import Object, find, object_tables, typical_mass
from .pictures import lpips_distance, mean_squared_error, open_lpips, psnr, ssim


def read_films(path: Path | str, context: int = 4) -> Rollout:
    """An npz of uint8 `recorded` and `generated` (N, T, Y, X, C), of any origin.

    Args:
        context: number of frames at their beginning that were given, for a file without `context`.

    Raises:
        ValueError: the file is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("recorded", "generated", "context") if name in file}
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"films: {path} must be an npz file, is unreadable: {error}") from error
    for name in ("recorded", "generated"):
        if name not in arrays:
            raise ValueError(f"films: {path} must have an array {name!r}, has {', '.join(arrays) or 'none of ours'}")
    own = arrays.get("context", np.array(context))
    if own.size != 1 or own.dtype.kind not in "iu":
        raise ValueError(f"films: {path}: context must be one integer, got {own.dtype} {own.shape}")
    return Rollout(arrays["generated"], arrays["recorded"], int(own.item()))


def check_films(films: Rollout) -> None:
    """Raises ValueError where they cannot be compared."""
    made, truth = films.frames, films.truth
    if truth is None:
        raise ValueError("films: must have recorded frames to compare with, got none")
    for name, x in (("generated", made), ("recorded", truth)):
        if x.dtype != np.uint8 or x.ndim != 5 or 0 in x.shape or x.shape[-1] not in (1, 3):
            raise ValueError(f"films: {name} must be uint8 (N, T, Y, X, 3 or 1), got {x.dtype} {x.shape}")
    if made.shape != truth.shape:
        raise ValueError(f"films: recorded and generated must have one shape, got {truth.shape} and {made.shape}")
    if not 1 <= films.context < made.shape[1]:
        raise ValueError(f"context: must be in [1, {made.shape[1]}), a frame to be generated, got {films.context}")


def copied(films: Rollout) -> np.ndarray:
    """The recorded frames with those after the context replaced by its last one."""
    assert films.truth is not None
    frames = films.truth.copy()
    frames[:, films.context :] = frames[:, films.context - 1 : films.context]
    return frames


def evaluate_films(
    films: Rollout, *, wanted: Object | None = None, groups: Sequence[Any] | None = None, seed: int = 0,
    callback: Callable[[float], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """PSNR, SSIM, LPIPS, Fréchet distance and the object, by horizon and in all, with intervals over films.

    Args:
        films: with a truth, uint8; wanted: the object to look for, if any.
        groups: of each film, of what is drawn together for the intervals; each film by itself if None.
        callback: called with the share that is done.

    Returns:
        films, groups, context, frames, psnr, ssim, lpips, frechet, object and notes, as JSON has them; what was not
        measured is None. docs/evaluation.md says what is what.

    Raises:
        ValueError: films that cannot be compared.
    """
    check_films(films)
    made, truth, given = films.frames, films.truth, films.context
    assert truth is not None
    say = callback or (lambda share: None)
    bootstrap, notes = Bootstrap(len(made), groups, seed), []
    if not np.array_equal(made[:, :given], truth[:, :given]):
        notes.append(f"the first {given} frames, the context, differ between recorded and generated films")
    rows = {"generated": made, "copy": copied(films)}
    mse = {name: mean_squared_error(x[:, given:], truth[:, given:]) for name, x in rows.items()}
    say(0.1)
    alike = {name: ssim(x[:, given:], truth[:, given:]) for name, x in rows.items()}
    say(0.5)
    network, problem = open_lpips()
    lpips = None
    if network is None:
        notes.append(problem)
    else:
        far = {name: lpips_distance(network, x[:, given:], truth[:, given:]) for name, x in rows.items()}
        lpips = _against_copy(bootstrap, far)
    say(0.7)
    features = {name: frame_features(x)[:, given - 1 :] for name, x in {"recorded": truth, **rows}.items()}
    say(0.9)
    result = {
        "films": len(made),
        "groups": bootstrap.groups,
        "context": given,
        "frames": made.shape[1] - given,
        "psnr": {
            "generated": bootstrap.curve(mse["generated"], of=psnr),
            "copy": bootstrap.curve(mse["copy"], of=psnr),
            "gain": bootstrap.curve(mse["generated"], mse["copy"], of=lambda a, b: psnr(a) - psnr(b)),
        },
        "ssim": _against_copy(bootstrap, alike),
        "lpips": lpips,
        "frechet": _frechet(features),
        "object": None if wanted is None else _objects(films, rows, wanted, bootstrap, notes),
        "notes": notes,
    }
    say(1.0)
    return result


def _against_copy(bootstrap: Bootstrap, tables: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        **{name: bootstrap.curve(table) for name, table in tables.items()},
        "gain": bootstrap.curve(tables["generated"], tables["copy"], of=lambda a, b: a - b),
    }


def _frechet(features: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Of the frames after the context, and of the recorded ones of every other film against the rest."""
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in features.items()}
    enough = len(flat["recorded"]) > 1
    halves = [features["recorded"][i::2] for i in (0, 1)]
    halves = [x.reshape(-1, x.shape[-1]) for x in halves]
    return {
        "generated": frechet_distance(flat["generated"], flat["recorded"]) if enough else None,
        "copy": frechet_distance(flat["copy"], flat["recorded"]) if enough else None,
        "recorded_halves": frechet_distance(*halves) if min(map(len, halves)) > 1 else None,
    }


def _objects(
    films: Rollout, rows: dict[str, np.ndarray], wanted: Object, bootstrap: Bootstrap, notes: list[str]
) -> dict[str, Any] | None:
    """The object's part of the result; None, and a note, where no context ends with the object in sight."""
    assert films.truth is not None
    given = films.context
    recorded = find(films.truth, wanted)
    typical = typical_mass(recorded)
    seen = recorded.detected(typical)[:, given - 1]  # against NaN nothing is detected
    if not seen.any():
        notes.append(f"the object of colour {wanted.colour} is in no film's last given frame: it is not measured")
        return None
    result: dict[str, Any] = {
        "colour": list(wanted.colour),
        "side": wanted.side,
        "within": wanted.within,
        "films": int(seen.sum()),
        "typical_mass": typical,
        "shown": [int(n) for n in recorded.detected(typical)[seen][:, given:].sum(0)],
    }
    for name, frames in rows.items():
        tables = object_tables(recorded, find(frames, wanted), typical, wanted.within, given)
        for table in tables.values():
            table[~seen] = np.nan
        result[name] = {key: bootstrap.curve(table) for key, table in tables.items()}
    return result
