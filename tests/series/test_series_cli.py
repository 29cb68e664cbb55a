"""The commands with tiny settings: they write what they promise, go on where they stopped, and refuse by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tyro
from sae_diffusion.series import Source
from sae_diffusion.series import study as study_module
from sae_diffusion.series.cli import SeriesCommand, SeriesPlot, SeriesSample, SeriesStudy, SeriesTrain
from sae_diffusion.series.sampling import error_quartiles
from sae_diffusion.series.study import OWN, SHARED, Line, StudyConfig, run_study, summarise, table
from series_cases import TINY, tiny

GRID = StudyConfig(
    windows=(1, 4), swaps=(1, 2), seeds=(0,), losses=("v",), own_losses=("v",), length=4, base_steps=2, steps=2, batch=4, model=TINY,
    samples=4, sampling_steps=4,
)  # fmt: skip


def test_train_sample_plot(tmp_path, capsys):
    SeriesTrain(train=tiny(tmp_path, steps=3)).run()
    assert "fresh series of 5 points" in capsys.readouterr().out
    SeriesSample(run_dir=tmp_path / "run", count=6, sampling_steps=5, likelihood=2, device="cpu").run()
    out = tmp_path / "run" / "samples"
    assert f"{out}/samples.png" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    x = np.load(out / "samples.npz")["series"]
    assert x.shape == (6, 5, 1)
    assert report["clause_error"] == error_quartiles(Source(length=5), x)
    assert report["nll"]["series"] == 2 and np.isfinite(report["nll"]["nats_per_series"])
    assert report["schedule"]["window"] == 2.0
    SeriesSample(
        run_dir=tmp_path / "run", out=tmp_path / "w", count=2, sampling_steps=4, likelihood=0, window=1.0, device="cpu"
    ).run()
    report = json.loads((tmp_path / "w" / "report.json").read_text())
    assert report["schedule"]["window"] == 1.0 and "nll" not in report
    SeriesSample(
        run_dir=tmp_path / "run", out=tmp_path / "g", count=3, sampling_steps=4, likelihood=0, given=2, device="cpu"
    ).run()
    content = np.load(tmp_path / "g" / "samples.npz")
    np.testing.assert_array_equal(content["series"][:, :2], content["heldout"][:3, :2])
    assert (content["series"][:, 2:] != content["heldout"][:3, 2:]).any()
    SeriesPlot(source=Source(length=5), out=tmp_path / "x.png", count=8).run()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_own_series_from_file_to_samples(tmp_path):
    path = tmp_path / "own.csv"
    x = np.random.default_rng(0).normal(size=(12, 5, 2))
    rows = [f"{s},{t},{x[s, t, 0]},{x[s, t, 1]}" for s in range(12) for t in range(5)]
    path.write_text("series,time,left,right\n" + "\n".join(rows) + "\n")
    SeriesTrain(train=tiny(tmp_path, data=path, steps=2)).run()
    SeriesSample(run_dir=tmp_path / "run", count=3, sampling_steps=4, likelihood=0, device="cpu").run()
    content = np.load(tmp_path / "run" / "samples" / "samples.npz")
    assert content["series"].shape == (3, 5, 2) and content["heldout"].shape == (1, 5, 2)
    assert "clause_error" not in json.loads((tmp_path / "run" / "samples" / "report.json").read_text())
    SeriesPlot(data=path, out=tmp_path / "own.png", channel=1).run()
    with pytest.raises(ValueError, match=r"channel: must be in \[0, 2\), got 2"):
        SeriesPlot(data=path, out=tmp_path / "own.png", channel=2).run()


def test_study_writes_resumes_and_does_not_mix_settings(tmp_path, monkeypatch):
    whole = run_study(GRID, tmp_path / "whole")
    assert whole["cells"] == "8 of 8" and (tmp_path / "whole" / "windows.png").exists()
    out = tmp_path / "out"
    first = run_study(dataclasses.replace(GRID, windows=(1,)), out)
    assert first["cells"] == "4 of 4"
    trained = []
    original = study_module.SeriesTrainer
    monkeypatch.setattr(study_module, "SeriesTrainer", lambda c: trained.append(c.schedule) or original(c))
    seen = []
    SeriesStudy(out=out, study=GRID, workers=1).run()
    assert [(s.kind, s.window) for s in trained] == [("staggered", 4.0)] * 4  # neither bases nor w = 1 again
    result = json.loads((out / "windows.json").read_text())
    for row, expected in zip(result["rows"], whole["rows"]):
        assert row == expected
    assert run_study(GRID, out, callback=lambda *a: seen.append(a))["rows"] == whole["rows"] and seen[0] == (8, 8)
    with pytest.raises(ValueError, match="must have the same settings"):
        run_study(dataclasses.replace(GRID, steps=3), out)
    with pytest.raises(ValueError, match=r"own_losses: must be among losses"):
        dataclasses.replace(GRID, own_losses=("x0",))
    with pytest.raises(ValueError, match="workers: must be at least 1"):
        run_study(GRID, out, workers=0)


def test_study_stops_in_time(tmp_path):
    result = run_study(GRID, tmp_path, max_seconds=-1)
    assert result["cells"] == "0 of 8" and result["rows"] == []


def test_summary_and_table():
    config = dataclasses.replace(GRID, seeds=(0, 1), swaps=(1,), windows=(8,), own_losses=())
    cell = {"loss": 0.5, "base_cpu_seconds": 30, "training_cpu_seconds": 20, "sampling_cpu_seconds": 10}
    cells = {(Line("v", 1, s, SHARED), 8): {**cell, "errors": [s + 0.0, s + 0.5]} for s in (0, 1)}
    result = summarise(config, cells)
    (row,) = result["rows"]
    assert (row["q25"], row["median"], row["q75"]) == (0.375, 0.75, 1.125)
    assert row["seed_medians"] == [0.25, 1.25] and result["cpu_minutes"] == 2.0 and result["cells"] == "2 of 2"
    assert table(result).splitlines() == [
        "| window | one network, loss in v: natural order |",
        "|---|---|",
        "| 8 | 0.75 (0.38 to 1.1) |",
    ]


def test_second_training_sees_other_series():
    seeds = {GRID.training(Line("v", 1, s, OWN), w).seed for s in (0, 1) for w in (None, 1, 4)}
    assert len(seeds) == 6


def test_command_line():
    train = tyro.cli(SeriesCommand, args=["train", "--schedule.window", "4", "--source.order", "swaps", "--steps", "7"])
    assert train.train.schedule.window == 4 and train.train.source.order == "swaps" and train.train.steps == 7
    assert tyro.cli(SeriesCommand, args=["sample", "--run-dir", "x", "--solver", "dpm++2m"]).solver == "dpm++2m"
    assert tyro.cli(SeriesCommand, args=["study", "--minutes", "3"]).minutes == 3
    assert tyro.cli(SeriesCommand, args=["plot", "--data", "a.csv"]).data == Path("a.csv")
    with pytest.raises(ValueError, match="count: must be at least 1"):
        SeriesSample(run_dir=Path("x"), count=0).run()
