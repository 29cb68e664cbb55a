"""Curves of an evaluation, with their intervals shaded. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.format import atomic_path

OURS, COPYING = "tab:orange", "tab:grey"


def plot_films(path: Path, films: dict[str, Any]) -> None:
    """Metrics by horizon, of `evaluate_films`."""
    panels: list[tuple[str, list[tuple[str, dict[str, Any], str]]]] = [
        (title, [("generated", films[key]["generated"], OURS), ("copying", films[key]["copy"], COPYING)])
        for key, title in (("psnr", "PSNR, dB"), ("ssim", "SSIM"), ("lpips", "LPIPS"))
        if films[key] is not None
    ]
    if (found := films["object"]) is not None:
        for key in ("detected", "hit", "mass", "sharpness"):
            lines = [("generated", found["generated"][key], OURS)]
            if key == "hit":
                lines.append(("copying", found["copy"][key], COPYING))
            panels.append((f"object: {key}", lines))
    figure, axes = _panels(len(panels))
    for axis, (title, lines) in zip(axes, panels):
        for label, curve, colour in lines:
            _line(axis, range(1, films["frames"] + 1), curve["by_horizon"], label, colour)
        axis.set(xlabel="frames after the context", title=title)
    axes[0].legend()
    _save(figure, path)


def plot_errors(path: Path, errors: dict[str, Any]) -> None:
    """Denoising errors by noise level and by frame, of `summarise_errors`."""
    figure, axes = _panels(2)
    names = (("full_context", "whole past", OURS), ("last_frame", "last block", "tab:blue"),
             ("no_context", "no past", "tab:green"))  # fmt: skip
    for name, label, colour in names:
        _line(axes[0], errors["sigma"], errors[name], label, colour)
    axes[0].axhline(errors["copy"]["value"], color=COPYING, linestyle="--", label="copying")
    axes[0].set(xlabel="noise level", xscale="log", yscale="log", title="squared error")
    by_frame = errors["by_frame"]
    for i, sigma in enumerate(errors["sigma"]):
        row = {key: values[i] for key, values in by_frame["full_context"].items()}
        _line(axes[1], range(len(row["value"])), row, f"{sigma:g}", None)
    _line(axes[1], range(len(by_frame["copy"]["value"])), by_frame["copy"], "copying", COPYING)
    axes[1].set(xlabel="frame", yscale="log", title="squared error, whole past, by noise level")
    for axis in axes:
        axis.legend(fontsize="small")
    _save(figure, path)


def _panels(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(count, 4)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    for axis in axes.flat[:count]:
        axis.grid(alpha=0.3)
    return figure, axes.flat


def _line(axis: Any, x: Any, estimate: dict[str, Any], label: str, colour: str | None) -> None:
    """A line of what is there, its interval shaded."""
    x = list(x)
    there = [i for i in range(len(x)) if None not in (estimate["value"][i], estimate["low"][i], estimate["high"][i])]
    values, low, high = ([estimate[key][i] for i in there] for key in ("value", "low", "high"))
    (line,) = axis.plot([x[i] for i in there], values, color=colour, label=label, marker=".")
    axis.fill_between([x[i] for i in there], low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
