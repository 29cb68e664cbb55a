"""Bits per dimension over bases and softness, with standard errors over training seeds, in one table."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..disk import write_json, write_text
from ..figures import new_figure, save_figure
from ..media import write_png
from ..train.checkpoint import provenance
from ..train.task import json_fields
from .components import check_basis
from .config import EvaluateConfig, ImageTrainConfig, StudyConfig
from .data import ImageSet
from .evaluate import contact_sheet, evaluate, sample_images
from .schedule import in_flight
from .train import ImageTrainer

RESULTS, TABLE, PLOT, SAMPLES = "bits-per-dim.json", "bits-per-dim.md", "bits-per-dim.png", "samples.png"


def run_study(
    study: StudyConfig,
    train: ImageTrainConfig,
    evaluation: EvaluateConfig,
    images: ImageSet,
    out: Path,
    *,
    samples: int = 16,
    sample_steps: int = 256,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Train and measure every cell that is missing in the results in `out`; the same call resumes.

    After each cell it writes bits-per-dim.json, the table, the plot and the samples (of the first seed).

    Raises:
        ValueError: `out` holds results with other settings, or a basis does not fit these images.
    """
    for basis in study.bases:
        check_basis(basis, images.shape)
    settings: dict[str, Any] = {
        "train": {k: v for k, v in json_fields(train).items() if k not in ("basis", "seed", "data_path")},
        "evaluate": dataclasses.asdict(evaluation),
        "images": images.fingerprint(),
        "levels": images.levels,
    }
    settings["train"]["schedule"].pop("softness")
    path = Path(out) / RESULTS
    results: dict[str, Any] = {"settings": settings, "runs": []}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            raise ValueError(f"{path}: must hold results with the same settings, got others; choose another --out")
    done = {(r["basis"], r["softness"], r["seed"]) for r in results["runs"]}
    cells = study.cells()
    for number, (basis, softness, seed) in enumerate(cells):
        if (basis, softness, seed) in done:
            continue
        schedule = dataclasses.replace(train.schedule, softness=softness)
        chosen: dict[str, Any] = {"basis": basis, "schedule": schedule, "seed": seed}
        config = dataclasses.replace(train, **chosen)
        run, sheet = _run_cell(config, evaluation, images, samples if seed == study.seeds[0] else 0, sample_steps)
        results["runs"].append(run)
        results |= {**provenance(), "machine": f"{os.cpu_count()} cores, one thread"}
        if sheet is not None:
            results.setdefault("samples", []).append(
                {"basis": basis, "softness": softness, "shape": list(sheet.shape), "pixels": sheet.tobytes().hex()}
            )
        write_results(results, Path(out))
        if progress is not None:
            text = f"{basis}, softness {softness:g}, seed {seed}: {run['bits']:.3f} bits/dim"
            progress(number + 1, len(cells), text)
    write_results(results, Path(out))
    return results


def _run_cell(
    config: ImageTrainConfig, evaluation: EvaluateConfig, images: ImageSet, samples: int, sample_steps: int
) -> tuple[dict[str, Any], np.ndarray | None]:
    start = time.process_time()
    trainer = ImageTrainer(config, images)
    trainer.train()
    trained = time.process_time()
    model = trainer.averaged()
    bits = evaluate(model, images.heldout, evaluation)
    run = {
        "basis": config.basis,
        "softness": config.schedule.softness,
        "seed": config.seed,
        "bits": bits.mean,
        "error_over_images": bits.standard_error,
        "untrained": float(bits.gaussian.mean()),
        "in_flight": in_flight(model.schedule) * model.basis.size,
        "evaluations": bits.evaluations,
        "train_cpu_seconds": round(trained - start, 1),
        "evaluate_cpu_seconds": round(time.process_time() - trained, 1),
    }
    sheet = sample_images(model, samples, steps=sample_steps, seed=0) if samples else None
    return run, sheet


def table(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per basis and softness: bits, standard error over seeds, number of seeds, and what does not vary."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        groups.setdefault((run["basis"], run["softness"]), []).append(run)
    entries = []
    for (basis, softness), runs in groups.items():
        bits = np.array([r["bits"] for r in runs])
        entries.append(
            {
                "basis": basis,
                "softness": softness,
                "bits": float(bits.mean()),
                "error": float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else None,
                "seeds": len(bits),
                "error_over_images": float(np.mean([r["error_over_images"] for r in runs])),
                "untrained": runs[0]["untrained"],
                "in_flight": runs[0]["in_flight"],
            }
        )
    return entries


def _axes(entries: Sequence[dict[str, Any]]) -> tuple[list[str], list[float]]:
    return list(dict.fromkeys(e["basis"] for e in entries)), sorted({e["softness"] for e in entries}, reverse=True)


def markdown(results: dict[str, Any]) -> str:
    """The table: bases down, softness across, bits/dim ± standard error over seeds (components in flight)."""
    entries = table(results)
    bases, softness = _axes(entries)
    cell = {(e["basis"], e["softness"]): e for e in entries}
    lines = [
        "| basis | untrained | " + " | ".join(_label(s) for s in softness) + " |",
        "|---|---|" + "---|" * len(softness),
    ]
    for basis in bases:
        known = [cell[basis, s] for s in softness if (basis, s) in cell]
        texts = [
            f"{e['bits']:.3f} ± {_number(e['error'])} ({e['in_flight']:.1f})" if (e := cell.get((basis, s))) else ""
            for s in softness
        ]
        lines.append(f"| {basis} | {known[0]['untrained']:.3f} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def report(results: dict[str, Any]) -> str:
    """The table with its settings, errors, date, versions and command."""
    settings, entries = results["settings"], table(results)
    train, how = settings["train"], settings["evaluate"]
    errors = sorted(e["error_over_images"] for e in entries)
    seeds = sorted({e["seeds"] for e in entries})
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"Bits per dimension of {how['images'] or 'all'} held-out images of {train['data']}, {settings['levels']} "
        f"levels: mean ± standard error over {' to '.join(map(str, seeds))} training seeds (mean number of components "
        f"in flight). Every run has {train['steps']} steps of {train['batch_size']} images. Untrained are independent "
        f"normal components. Images and probes ({how['divergence']}, {how['probes']}) are the same for all; "
        f"others would change a cell by {errors[0]:.3f} to {errors[-1]:.3f} (standard error).\n\n"
        + markdown(results)
        + f"\n`{results['command']}`, {results['date']}, {results['machine']}; {packages}.\n"
    )


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _label(softness: float) -> str:
    text = f"1/{1 / softness:g}" if 0 < softness < 1 else f"{softness:g}"
    return f"softness {text}" + (" (standard)" if softness == 1 else "")


def write_results(results: dict[str, Any], out: Path) -> None:
    """JSON, table, plot and samples, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    sheets = results.get("samples", [])
    stored = {**results, "table": table(results)}
    write_json(out / RESULTS, stored)
    write_text(out / TABLE, report(results))
    _plot(results, out / PLOT)
    if sheets:
        pictures = [np.frombuffer(bytes.fromhex(s["pixels"]), np.uint8).reshape(s["shape"]) for s in sheets]
        sheet = contact_sheet(np.concatenate(pictures), results["settings"]["levels"], len(pictures[0]), scale=3)
        write_png(out / SAMPLES, sheet)


def _plot(results: dict[str, Any], path: Path) -> None:
    entries = table(results)
    bases, _ = _axes(entries)
    figure, (axes,) = new_figure(6, 4)
    for basis in bases:
        mine = sorted((e for e in entries if e["basis"] == basis), key=lambda e: e["softness"])
        mine = [e for e in mine if math.isfinite(e["softness"])]
        errors = [e["error"] or 0.0 for e in mine]
        line = axes.errorbar(
            [e["softness"] for e in mine], [e["bits"] for e in mine], errors, marker="o", capsize=3, label=basis
        )
        if mine:
            axes.axhline(mine[0]["untrained"], color=line[0].get_color(), linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("softness (1 = standard diffusion, towards 0 one component after another)")
    axes.set_ylabel("bits per dimension, held out")
    axes.set_title("dotted: independent normal components (untrained)", fontsize=9)
    axes.legend()
    save_figure(figure, path)
