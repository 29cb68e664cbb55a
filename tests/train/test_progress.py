"""Progress of long commands where stderr is no terminal: a line every few seconds, with the time that is left."""

from __future__ import annotations

import pytest
from sae_diffusion import cli, progress
from sae_diffusion.images.cli import ImagesEvaluate, ImagesSample
from sae_diffusion.images.config import EvaluateConfig
from sae_diffusion.series.cli import SeriesSample


def test_a_line_every_few_seconds_says_what_is_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.progress_bar("collect", 12, "episodes") as bar:
        for done in range(1, 13):
            clock[0] += 2.0
            bar.update(done, f"{10 * done} frames")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"collect {n}/12 episodes, {10 * n} frames, 0:{2 * n:02d} elapsed, 0:{24 - 2 * n:02d} left"
        for n in (3, 6, 9, 12)
    ]
    # What was done before counts for nothing; a caller may know the time left better, and wants its line now.
    bar = progress.Progress("train", 100, "steps", start=90)
    clock[0] += 3661.0
    bar.update(95)
    bar.update(96, "loss 0.5", left=7.0, now=True)
    assert capsys.readouterr().err.splitlines() == [
        "train 95/100 steps, 1:01:01 elapsed, 1:01:01 left", "train 96/100 steps, loss 0.5, 1:01:01 elapsed, 0:07 left",
    ]  # fmt: skip


def reached(err: str, name: str, total: str) -> list[int]:
    """The numbers done in the lines of one stage."""
    found = [line.split()[1] for line in err.splitlines() if line.startswith(f"{name} ")]
    assert found and all(text.endswith(f"/{total}") for text in found), err
    return [int(text.partition("/")[0]) for text in found]


def test_series_and_images_show_theirs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    run = tmp_path / "series"
    assert cli.main(
        f"series train --run-dir {run} --source.length 4 --model.width 8 --model.layers 1 --model.heads 1 --steps 3 "
        "--batch 4 --log-every 1 --no-tensorboard --device cpu".split()
    ) == 0  # fmt: skip
    assert reached(capsys.readouterr().err, "train", "3")[-1] == 3
    SeriesSample(run_dir=run, count=3, sampling_steps=4, likelihood=2, window=2.0, device="cpu").run()
    captured = capsys.readouterr()
    assert reached(captured.err, "sample", "4") == [1, 2, 3, 4]
    done = reached(captured.err, "likelihood", "2")
    assert len(done) > 4 and done[0] == 0 and done[-1] in (1, 2)
    assert "(2 of them; --likelihood for more)" in captured.out
    run = tmp_path / "images"
    assert cli.main(f"images train --run-dir {run} --steps 2 --batch-size 4 --net.channels 8 --device cpu".split()) == 0
    assert reached(capsys.readouterr().err, "train", "2")
    ImagesSample(run_dir=run, count=2, sampling_steps=3, device="cpu").run()
    assert reached(capsys.readouterr().err, "sample", "3") == [1, 2, 3]
    ImagesEvaluate(run_dir=run, evaluate=EvaluateConfig(images=3, tolerance=0.5), device="cpu").run()
    assert len(reached(capsys.readouterr().err, "evaluate", "3")) > 4


def test_series_sample_answers_soon_by_default():
    """What makes it slow is bounded by default: the evaluations of a likelihood's solver, and the series they are of."""
    default = SeriesSample(run_dir=None)  # type: ignore[arg-type]
    assert default.likelihood <= 16 and default.tolerance >= 1e-3
    with pytest.raises(ValueError, match="tolerance: must be in"):
        SeriesSample(run_dir=None, tolerance=0.0).run()  # type: ignore[arg-type]
