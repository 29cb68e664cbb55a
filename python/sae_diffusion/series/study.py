"""The window study: clause error over the window of a staggered schedule, for natural and permuted chains.

Every cell (order, window, seed) trains a network of its own with the same budget and samples it with its own schedule.
A finished cell is a small file, so that an interrupted study goes on where it was; cells run side by side in processes.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..diffusion.noise import derive_seed
from ..train.checkpoint import versions
from .data import Source
from .model import SeriesModelConfig
from .plot import plot_study
from .sampling import generate
from .train import ScheduleConfig, SeriesTrainConfig, SeriesTrainer

RESULT = "windows"  # stem of the table and the picture
_SAMPLE = 15


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The grid and the budget of each of its cells.

    Args:
        windows: of the staggered schedule.
        swaps: steps of the "swaps" orders; 1 is the natural order.
        seeds: networks per order and window.
        length: points of a series.
        steps, batch, lr: of each training.
        model: the network.
        start: log-SNR at t = 0.
        end: log-SNR at t = 1.
        samples: series per network that clause errors are taken from.
        sampling_steps: of the ancestral solver.
    """

    windows: tuple[float, ...] = (1, 2, 4, 8, 12, 16, 24, 64, 256)
    swaps: tuple[int, ...] = (1, 4)
    seeds: tuple[int, ...] = (0, 1)
    length: int = 20
    steps: int = 3000
    batch: int = 64
    lr: float = 3e-3
    model: SeriesModelConfig = field(default_factory=SeriesModelConfig)
    start: float = 9.2
    end: float = -4.6
    samples: int = 256
    sampling_steps: int = 300

    def __post_init__(self) -> None:
        for name in ("windows", "swaps", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name}: must name at least one, got none")
        for name in ("samples", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")

    def cells(self) -> list[tuple[int, float, int]]:
        """(swap step, window, seed), a whole grid for one seed before the next seed begins."""
        return [(swap, window, seed) for seed in self.seeds for swap in self.swaps for window in self.windows]

    def training(self, swap: int, window: float, seed: int) -> SeriesTrainConfig:
        return SeriesTrainConfig(
            source=Source(length=self.length, order="swaps", step=swap),
            schedule=ScheduleConfig(window=float(window), start=self.start, end=self.end),
            model=self.model, steps=self.steps, batch=self.batch, lr=self.lr, warmup=min(200, self.steps // 10),
            seed=seed, device="cpu",
        )  # fmt: skip


def order_name(swap: int) -> str:
    return "natural order" if swap == 1 else f"swaps, step {swap}"


def run_cell(config: StudyConfig, swap: int, window: float, seed: int) -> dict[str, Any]:
    """Train and sample one network on one thread; its clause errors and times."""
    torch.set_num_threads(1)
    training = config.training(swap, window, seed)
    trainer = SeriesTrainer(training)
    began = time.process_time()
    losses = torch.stack([trainer.train_step() for _ in range(training.steps)])
    trained = time.process_time()
    x = generate(
        trainer.averaged(), trainer.stats, trainer.schedule, config.samples,
        steps=config.sampling_steps, seed=derive_seed(seed, _SAMPLE), batch=64,
    )  # fmt: skip
    errors = np.sort(training.source.clause_error(x))
    tail = losses[-max(1, training.steps // 10) :]
    return {
        "swap": swap,
        "window": window,
        "seed": seed,
        "final_loss": float(tail.mean()),
        "training_cpu_seconds": round(trained - began, 1),
        "sampling_cpu_seconds": round(time.process_time() - trained, 1),
        "errors": [float(f"{e:.4g}") for e in errors],
    }


def _cell_path(folder: Path, swap: int, window: float, seed: int) -> Path:
    return folder / "cells" / f"swap{swap}-window{window:g}-seed{seed}.json"


def run_study(
    config: StudyConfig,
    out: Path,
    *,
    workers: int = 1,
    max_seconds: float | None = None,
    callback: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Run the cells that `out` does not hold yet; write windows.json, windows.md and windows.png there.

    Args:
        out: folder; finished cells of the same settings in it are kept.
        workers: processes, one thread each.
        max_seconds: begin no cell after so long; the result then says which are missing.
        callback: called with (cells done, cells in all, note).

    Raises:
        ValueError: workers below 1, or the folder holds cells of other settings.
    """
    if workers < 1:
        raise ValueError(f"workers: must be at least 1, got {workers}")
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    # what a single cell depends on: windows, orders and seeds can be added later
    budget = {name: value for name, value in settings.items() if name not in ("windows", "swaps", "seeds")}
    (out / "cells").mkdir(parents=True, exist_ok=True)
    kept: dict[tuple[int, float, int], dict[str, Any]] = {}
    for cell in config.cells():
        path = _cell_path(out, *cell)
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] != budget:
                raise ValueError(f"out: {path} was made with other settings; name another folder")
            kept[cell] = content["cell"]
    todo = [cell for cell in config.cells() if cell not in kept]
    total, began = len(config.cells()), time.perf_counter()

    def finish(cell: tuple[int, float, int], result: dict[str, Any]) -> None:
        kept[cell] = result
        path = _cell_path(out, *cell)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"settings": budget, "cell": result}), encoding="utf-8")
        os.replace(temporary, path)
        if callback is not None:
            callback(len(kept), total, f"{order_name(cell[0])}, w = {cell[1]:g}: {np.median(result['errors']):.3g}")

    def in_time() -> bool:
        return max_seconds is None or time.perf_counter() - began < max_seconds

    if callback is not None:
        callback(len(kept), total, "")
    if workers == 1:
        for cell in todo:
            if not in_time():
                break
            finish(cell, run_cell(config, *cell))
    else:
        # spawn: a forked child would inherit the parent's thread pools in an unknown state
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            running: dict[Any, tuple[int, float, int]] = {}
            queue = list(todo)
            while queue or running:
                while queue and len(running) < workers and in_time():
                    cell = queue.pop(0)
                    running[pool.submit(run_cell, config, *cell)] = cell
                if not running:
                    break
                done = next(as_completed(running))
                finish(running.pop(done), done.result())
    result = summarise(config, [kept[cell] for cell in config.cells() if cell in kept])
    result["workers"] = workers
    (out / f"{RESULT}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"{RESULT}.md").write_text(table(result) + "\n", encoding="utf-8")
    if result["rows"]:
        plot_study(out / f"{RESULT}.png", result["rows"], config.length)
    return result


def summarise(config: StudyConfig, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The study as JSON: per order and window the quartiles over all seeds' series, and each seed's median."""
    rows = []
    for swap in config.swaps:
        for window in config.windows:
            own = [cell for cell in cells if (cell["swap"], cell["window"]) == (swap, window)]
            if not own:
                continue
            low, median, high = np.quantile(np.concatenate([cell["errors"] for cell in own]), [0.25, 0.5, 0.75])
            rows.append(
                {
                    "order": order_name(swap),
                    "swap": swap,
                    "window": window,
                    "q25": _round(low),
                    "median": _round(median),
                    "q75": _round(high),
                    "seed_medians": [_round(np.median(cell["errors"])) for cell in own],
                    "seeds": [cell["seed"] for cell in own],
                    "final_loss": _round(np.mean([cell["final_loss"] for cell in own])),
                }
            )
    seconds = sum(cell["training_cpu_seconds"] + cell["sampling_cpu_seconds"] for cell in cells)
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["sae", *sys.argv[1:]]),
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "settings": json.loads(json.dumps(dataclasses.asdict(config))),
        "cells": f"{len(cells)} of {len(config.cells())}",
        "cpu_minutes": round(seconds / 60, 1),
        "rows": rows,
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}") if math.isfinite(value) else value


def table(result: dict[str, Any]) -> str:
    """Markdown: a line per window, a column per order, median (first to third quartile)."""
    rows = {(row["order"], row["window"]): row for row in result["rows"]}
    orders = list(dict.fromkeys(order for order, _ in rows))
    lines = ["| window | " + " | ".join(orders) + " |", "|---" * (1 + len(orders)) + "|"]
    for window in dict.fromkeys(window for _, window in rows):
        texts = []
        for order in orders:
            row = rows.get((order, window))
            texts.append("" if row is None else f"{row['median']:.3g} ({row['q25']:.2g} to {row['q75']:.2g})")
        lines.append(f"| {window:g} | " + " | ".join(texts) + " |")
    return "\n".join(lines)
