"""An evaluation for people: a table on the screen, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.format import write_json
from ..media import write_png
from ..rollout import Rollout

RESULT = "evaluation.json"
FORMAT = {"format": "sae-evaluation", "version": 1}
SHOWN = (1, 4)  # horizons in the table


def write_evaluation(folder: Path, numbers: dict[str, Any], films: Rollout) -> list[Path]:
    """Write evaluation.json and strip.png into `folder`, each whole or not at all; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in (RESULT, "strip.png")]
    write_json(paths[0], FORMAT | numbers)
    write_png(paths[1], films.strip(2, videos=6, max_frames=18))
    return paths


def show(numbers: dict[str, Any]) -> None:
    """Print the tables of an evaluation."""
    from rich.console import Console

    console = Console()
    console.print(films_table(numbers["films"]))


def films_table(films: dict[str, Any]) -> Any:
    """Of `evaluate_films`: a row for each metric; all frames with their interval, then some horizons."""
    frames = films["frames"]
    shown = sorted({h for h in SHOWN if h <= frames} | {frames})
    table = new_table(
        f"{films['films']} films of {frames} frames after {films['context']} given ones",
        "all [95 % interval]", *(f"frame {h}" for h in shown),
    )  # fmt: skip

    def row(name: str, curve: dict[str, Any], digits: int) -> None:
        each = curve["by_horizon"]["value"]
        table.add_row(name, estimate(curve["all"], digits), *(number(each[h - 1], digits) for h in shown))

    for key, name, digits in (("psnr", "PSNR, dB", 2), ("ssim", "SSIM", 3), ("lpips", "LPIPS", 3)):
        if films[key] is not None:
            row(name, films[key]["generated"], digits)
            row("  copying", films[key]["copy"], digits)
            row("  difference", films[key]["gain"], digits)
            table.add_section()
    found = films["object"]
    if found is not None:
        for key, name in (("detected", f"detected, of {found['films']}"), ("hit", "hit"), ("mass", "mass"),
                          ("sharpness", "sharpness")):  # fmt: skip
            row(name, found["generated"][key], 2)
            if key == "hit":
                row("  copying", found["copy"][key], 2)
        table.add_section()
    frechet = films["frechet"]
    table.add_row("Fréchet", number(frechet["generated"], 1))
    table.add_row("  copying", number(frechet["copy"], 1))
    table.add_row("  recorded halves", number(frechet["recorded_halves"], 1))
    return table


def new_table(title: str, *columns: str) -> Any:
    """A first column for names, and these."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def estimate(of: dict[str, Any], digits: int) -> str:
    value, low, high = (number(of[key], digits) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
