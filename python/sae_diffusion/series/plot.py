"""Pictures: series beside each other, and the window study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..figures import new_figure, save_figure

# Colour-blind safe (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def plot_series(path: Path, groups: dict[str, np.ndarray], *, shown: int = 4, channel: int = 0) -> Path:
    """One panel per named group of series (count, length, channels): `shown` of them and the middle half as a band."""
    figure, axes = new_figure(5 * len(groups), 3.2, len(groups), sharey=True)
    for axis, (name, x) in zip(axes, groups.items()):
        points = np.arange(x.shape[1])
        low, high = np.quantile(x[:, :, channel], [0.25, 0.75], axis=0)
        axis.fill_between(points, low, high, color="#999999", alpha=0.3, lw=0, label="middle half")
        for i, series in enumerate(x[:shown, :, channel]):
            axis.plot(points, series, color=COLOURS[i % len(COLOURS)], lw=1.2, marker=".", ms=4)
        axis.set(title=f"{name}, {len(x)} series", xlabel="point")
        axis.locator_params(axis="x", integer=True)
    axes[0].legend(frameon=False)
    return save_figure(figure, path)


def plot_study(path: Path, rows: list[dict[str, Any]], length: int) -> Path:
    """Clause error over window, a panel per training and loss, a line per order: median and quartiles."""
    panels = list(dict.fromkeys((row["training"], row["loss"]) for row in rows))
    figure, axes = new_figure(1.5 + 3.7 * len(panels), 3.8, len(panels), sharey=True)
    ticks = sorted({row["window"] for row in rows})
    for axis, panel in zip(axes, panels):
        inside = [row for row in rows if (row["training"], row["loss"]) == panel]
        for colour, order in zip(COLOURS, dict.fromkeys(row["order"] for row in inside)):
            own = sorted((row for row in inside if row["order"] == order), key=lambda row: row["window"])
            window = [row["window"] for row in own]
            low, high = [row["q25"] for row in own], [row["q75"] for row in own]
            axis.fill_between(window, low, high, color=colour, alpha=0.15, lw=0)
            axis.plot(window, [row["median"] for row in own], color=colour, marker="o", ms=4, label=order)
            for row in own:
                medians = row["seed_medians"]
                axis.plot([row["window"]] * len(medians), medians, color=colour, ls="", marker="_", ms=7)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.axvline(length, color="#999999", lw=0.8, ls=":")
        axis.set(title=f"{panel[0]}, loss in {panel[1]}", xlabel=f"window (1: autoregressive; {length} points)")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        axis.minorticks_off()
    axes[0].set_ylabel("clause error of a series")
    axes[0].legend(frameon=False, fontsize=8, title="median, quartiles; dashes: seeds", title_fontsize=8)
    return save_figure(figure, path)
