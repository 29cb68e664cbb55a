"""Figures of matplotlib, which is imported when the first one is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .disk import atomic_path


def new_figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """(figure, its axes from left to right), of a size in inches; options of `Figure.subplots`."""
    from matplotlib.figure import Figure  # and not pyplot, which holds on to figures and asks for a screen

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **options)[0])


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write it in the format of the path's ending, into a folder that is made; the same figure gives the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.removeprefix(".")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=110, metadata={"Software": None} if kind == "png" else None)
    return path
