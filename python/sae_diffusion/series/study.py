"""The window study: clause error over the window of a staggered schedule, for natural and permuted chains.

For each loss, order and seed one network is trained on independent levels and sampled with every window. For some
losses a copy of it is then trained on each window separately and sampled with that window. Every finished cell is a
small file, so that an interrupted study can continue.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..checks import Count, check_value
from ..diffusion.noise import derive_seed
from ..disk import atomic_path, write_json, write_text
from ..train.checkpoint import provenance
from ..train.task import json_fields
from .config import OWN, SHARED, Line, StudyConfig
from .plot import plot_study
from .sampling import generate
from .train import SeriesTrainer, source_stats

RESULT = "windows"  # stem of the table and the picture
_SAMPLE = 15  # purpose of random numbers


def order_name(swap: int) -> str:
    return "natural order" if swap == 1 else f"swaps, step {swap}"


def _budget(config: StudyConfig) -> dict[str, Any]:
    """The settings that a single cell depends on; windows, orders, seeds and losses can be added later."""
    settings = json_fields(config)
    grid = ("windows", "swaps", "seeds", "losses", "own_losses")
    return {name: value for name, value in settings.items() if name not in grid}


def _cell_path(out: Path, line: Line, window: float) -> Path:
    kind = "shared-" if line.training == SHARED else ""
    return out / "cells" / f"{kind}{line.loss_space}-swap{line.swap}-seed{line.seed}-window{window:g}.json"


def run_line(config: StudyConfig, out: Path, line: Line, deadline: float | None = None) -> None:
    """Train, sample and write the missing cells of one line, on one thread; begin none after `deadline` (time.time)."""
    torch.set_num_threads(1)
    base_path = out / "bases" / f"{line.loss_space}-swap{line.swap}-seed{line.seed}.safetensors"
    base: dict[str, torch.Tensor] | None = None
    for window in config.windows:
        path = _cell_path(out, line, window)
        if path.exists() or (deadline is not None and time.time() > deadline):
            continue
        seconds = 0.0
        if base is None:
            base, seconds = _base(config, line, base_path)
        began = time.process_time()
        trainer = SeriesTrainer(config.training(line, window))
        trainer.model.load_state_dict(base)
        trainer.ema = trainer.task.make_average()
        trainer.task.stats = source_stats(trainer.config.source, line.seed)  # those of the base
        steps = config.steps if line.training == OWN else 0
        losses = [trainer.train_step().item() for _ in range(steps)]
        trained = time.process_time()
        x = generate(
            trainer.averaged(), trainer.stats, trainer.task.schedule, config.samples,
            steps=config.sampling_steps, seed=derive_seed(line.seed, _SAMPLE), batch=128,
        )  # fmt: skip
        cell = {
            "window": window,
            "loss": float(np.mean(losses[-max(1, steps // 4) :])) if losses else None,
            "base_cpu_seconds": round(seconds, 1),
            "training_cpu_seconds": round(trained - began, 1),
            "sampling_cpu_seconds": round(time.process_time() - trained, 1),
            "errors": [float(f"{e:.4g}") for e in np.sort(trainer.config.source.clause_error(x))],
        }
        write_json(path, {"settings": _budget(config), "line": line, "cell": cell})


def _base(config: StudyConfig, line: Line, path: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The network trained on independent levels, and the seconds it took now."""
    if path.exists():
        return load_file(path), 0.0
    began = time.process_time()
    trainer = SeriesTrainer(config.training(line, None))
    for _ in range(config.base_steps):
        trainer.train_step()
    state = trainer.averaged().state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
    return state, time.process_time() - began


def run_study(
    config: StudyConfig,
    out: Path,
    *,
    workers: int = 1,
    max_seconds: float | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run what is missing in `out`; write windows.json, windows.md and windows.png there.

    Args:
        out: folder; finished cells of the same settings in it are kept.
        workers: processes, one thread each.
        max_seconds: begin no network after this time; the result then says how many cells there are.
        callback: called with (cells done, cells in all).

    Raises:
        ValueError: workers below 1, or the folder holds cells of other settings.
    """
    check_value("workers", workers, Count)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    lines = config.lines()
    paths = {(line, window): _cell_path(out, line, window) for line in lines for window in config.windows}
    for path in paths.values():
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["settings"] != _budget(config):
            raise ValueError(f"out: {path} must have the same settings, got others; choose another folder")
    deadline = None if max_seconds is None else time.time() + max_seconds

    def report() -> None:
        if callback is not None:
            callback(sum(path.exists() for path in paths.values()), len(paths))

    report()
    if workers == 1:
        for line in lines:
            run_line(config, out, line, deadline)
            report()
    else:
        # spawn: a forked child would inherit the parent's thread pools in an unknown state
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(run_line, config, out, line, deadline) for line in lines}
            while running:
                done, running = wait(running, timeout=2)
                for future in done:
                    future.result()
                report()
    cells = {key: json.loads(path.read_text(encoding="utf-8"))["cell"] for key, path in paths.items() if path.exists()}
    result = summarise(config, cells)
    write_json(out / f"{RESULT}.json", result)
    write_text(out / f"{RESULT}.md", table(result) + "\n")
    if result["rows"]:
        plot_study(out / f"{RESULT}.png", result["rows"], config.length)
    return result


def summarise(config: StudyConfig, cells: dict[tuple[Line, float], dict[str, Any]]) -> dict[str, Any]:
    """The study as JSON: for each point of the figure the quartiles over all seeds' series, and each seed's median."""
    rows = []
    for loss, training in config.columns():
        for swap in config.swaps:
            for window in config.windows:
                lines = [Line(loss, swap, seed, training) for seed in config.seeds]
                own = {line.seed: cells[line, window] for line in lines if (line, window) in cells}
                if not own:
                    continue
                errors = np.concatenate([cell["errors"] for cell in own.values()])
                low, median, high = np.quantile(errors, [0.25, 0.5, 0.75])
                rows.append(
                    {
                        "training": training, "loss": loss, "order": order_name(swap), "swap": swap, "window": window,
                        "q25": _round(low), "median": _round(median), "q75": _round(high), "seeds": list(own),
                        "seed_medians": [_round(np.median(cell["errors"])) for cell in own.values()],
                    }
                )  # fmt: skip
    names = ("base_cpu_seconds", "training_cpu_seconds", "sampling_cpu_seconds")
    seconds = sum(cell[name] for cell in cells.values() for name in names)
    return {
        **provenance(),
        "cpu_minutes": round(seconds / 60, 1),
        "cells": f"{len(cells)} of {len(config.lines()) * len(config.windows)}",
        "settings": json_fields(config),
        "rows": rows,
    }


def _round(value: Any) -> float:
    return float(f"{value:.4g}")


def table(result: dict[str, Any]) -> str:
    """Markdown: a line per window, a column per training, loss and order: median (first to third quartile)."""
    rows = {(row["training"], row["loss"], row["order"], row["window"]): row for row in result["rows"]}
    columns = list(dict.fromkeys(key[:3] for key in rows))
    lines = [
        "| window | " + " | ".join(f"{training}, loss in {loss}: {order}" for training, loss, order in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for window in dict.fromkeys(key[3] for key in rows):
        cells = [rows.get((*column, window)) for column in columns]
        texts = ["" if c is None else f"{c['median']:.3g} ({c['q25']:.2g} to {c['q75']:.2g})" for c in cells]
        lines.append(f"| {window:g} | " + " | ".join(texts) + " |")
    return "\n".join(lines)
