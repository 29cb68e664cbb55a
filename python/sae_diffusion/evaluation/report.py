"""An evaluation for people: a table on the screen, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..disk import write_json
from ..media import write_png
from .drift import shown_at
from .plots import plot_errors, plot_films
from .run import Evaluation

RESULT = "evaluation.json"
FORMAT = {"format": "sae-evaluation", "version": 1}
SHOWN = (1, 4)  # horizons in the table


def write_evaluation(folder: Path, evaluation: Evaluation, about: dict[str, Any] | None = None) -> list[Path]:
    """Write evaluation.json, strip.png and plots of what was measured, each whole or not at all; returns their paths.

    Args:
        about: what was evaluated and how, for the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = evaluation.numbers
    pictures = {"strip.png": evaluation.films.strip(2, videos=6, max_frames=18)}
    if evaluation.long is not None:
        pictures["drift.png"] = shown_at(evaluation.long, numbers["drift"]["at"]).strip(2, videos=8)
    paths = [folder / RESULT, *(folder / name for name in pictures)]
    write_json(paths[0], {**FORMAT, "about": about or {}, **numbers})
    for name, picture in pictures.items():
        write_png(folder / name, picture)
    plots = {"films": ("horizon.png", plot_films), "errors": ("errors.png", plot_errors)}
    for part, (name, plot) in plots.items():
        if numbers.get(part) is not None:
            plot(folder / name, numbers[part])
            paths.append(folder / name)
    return paths


def show(numbers: dict[str, Any]) -> None:
    """Print the tables of an evaluation."""
    from rich.console import Console

    console = Console()
    for part, table in (("films", films_table), ("errors", errors_table), ("drift", drift_table)):
        if numbers.get(part) is not None:
            console.print(table(numbers[part]))


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


def errors_table(errors: dict[str, Any]) -> Any:
    """Of `summarise_errors`: a row for each noise level."""
    copying = number(errors["copy"]["value"], 4)
    table = new_table(
        f"Squared error of {errors['clips']} clips, denoised; of copying the last frame it is {copying}",
        "whole past [95 % interval]", "last block", "no past",
    )  # fmt: skip
    for i, sigma in enumerate(errors["sigma"]):
        whole = {key: values[i] for key, values in errors["full_context"].items()}
        rest = [number(errors[name]["value"][i], 4) for name in ("last_frame", "no_context")]
        table.add_row(f"noise {sigma:g}", estimate(whole, 4), *rest)
    return table


def drift_table(drift: dict[str, Any]) -> Any:
    """Of `summarise_drift`: a row for each metric, a column for each mark."""
    table = new_table(
        f"{drift['films']} long films with {drift['actions']} actions, against the last given frame",
        *(f"frame {mark}" for mark in drift["at"]),
    )
    rows = (("terrain_psnr", "terrain, PSNR in dB", 1), ("sky_psnr", "sky, PSNR in dB", 1),
            ("sky_level", "sky, grey levels", 1), ("frame_psnr", "whole frame, PSNR", 1), ("detail", "detail", 2),
            ("objects", "objects", 2))  # fmt: skip
    for name, label, digits in rows:
        columns = [{key: values[i] for key, values in drift[name].items()} for i in range(len(drift["at"]))]
        if any(column["value"] is not None for column in columns):
            table.add_row(label, *(estimate(column, digits) for column in columns))
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
