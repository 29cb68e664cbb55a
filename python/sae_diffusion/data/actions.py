"""Reading and checking actions: from a file beside a video, or from a file of their own."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from .format import DataError

ACTION_SUFFIXES = (".npy", ".csv", ".json")


def check_actions(raw: Any, frames: int, source: str) -> np.ndarray:
    """int64 (N-1,) or float32 (N-1, A) from N-1 rows for N frames, row t causing frame t+1; a last row N is unused."""
    rows = np.asarray(raw)
    if rows.dtype.kind not in "iuf":
        raise DataError(source, f"actions must be integers or floats, got {rows.dtype}")
    if rows.ndim == 2 and rows.shape[1] == 1 and rows.dtype.kind != "f":
        rows = rows[:, 0]
    if rows.ndim == 1 and rows.dtype.kind == "f":
        rows = rows[:, None]
    if rows.ndim != (2 if rows.dtype.kind == "f" else 1) or 0 in rows.shape[1:]:
        raise DataError(source, f"actions must be one integer or A floats per row, got {rows.dtype} {rows.shape}")
    if len(rows) not in (frames - 1, frames):
        raise DataError(
            source,
            f"{frames} frames must have {frames - 1} rows of actions (row t causes frame t+1) or {frames} (the last "
            f"is ignored), got {len(rows)}",
        )
    rows = rows[: frames - 1]
    if rows.dtype.kind == "f":
        if not np.isfinite(rows).all():
            raise DataError(source, f"action {int(np.argmin(np.isfinite(rows).all(1)))} is NaN or infinite")
        return rows.astype(np.float32)
    if len(rows) and (rows.min() < 0 or rows.max() > 2**31):
        raise DataError(source, f"discrete actions must be 0, 1, 2, ..., got values from {rows.min()} to {rows.max()}")
    return rows.astype(np.int64)


def _read_csv(path: Path) -> np.ndarray:
    with open(path, newline="", encoding="utf-8") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]

    def number(cell: str) -> bool:
        try:
            float(cell)
        except ValueError:
            return False
        return True

    if rows and not any(number(cell) for cell in rows[0]):
        rows = rows[1:]  # a header
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]) or not all(number(cell) for cell in row):
            raise ValueError(f"row {i} must hold {len(rows[0])} numbers, got {','.join(row)!r}")
    discrete = all(len(row) == 1 and re.fullmatch(r"[+-]?\d+", row[0]) for row in rows)
    return np.array([[int(c) if discrete else float(c) for c in row] for row in rows])


def read_side_file(video: Path, frames: int) -> np.ndarray | None:
    """Actions of `clip.mp4`: `clip.actions.npy`, `.csv` (a header is optional), `.json` (list or {"actions": list})."""
    found = [p for s in ACTION_SUFFIXES if (p := video.with_name(f"{video.stem}.actions{s}")).exists()]
    if not found:
        return None
    if len(found) > 1:
        raise DataError(video, f"must have one file of actions, got {', '.join(p.name for p in found)}")
    return check_actions(_read_rows(found[0]), frames, str(found[0]))


def read_actions(path: Path) -> np.ndarray:
    """All rows of a file in the formats of `read_side_file`, each causing one frame: int64 (N,) or float32 (N, A)."""
    rows = _read_rows(path)
    if rows.ndim < 1 or not len(rows):
        raise DataError(path, f"must hold a row of actions for each frame, got {rows.dtype} {rows.shape}")
    return check_actions(rows, len(rows) + 1, str(path))


def _read_rows(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".csv":
            return _read_csv(path)
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return np.array(content["actions"] if isinstance(content, dict) else content)
        raise ValueError(f"the name must end with one of {', '.join(ACTION_SUFFIXES)}")
    except Exception as error:
        raise DataError(path, f"unreadable actions: {error!r}") from error
