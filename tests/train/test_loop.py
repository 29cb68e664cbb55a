"""What one loop promises for every task: video with both objectives, series, images."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path

import pytest
from test_old_checkpoints import assert_same, images, series, tensors, video

TASKS = {
    "teacher": functools.partial(video, objective="teacher_forcing"),
    "forcing": functools.partial(video, objective="forcing"),
    "series": series,
    "images": images,
}


def records(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "clips_per_second")} for line in lines]


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_stopped_by_sigterm_between_two_records_repeats_the_whole_one(kind, tmp_path, capsys):
    whole = TASKS[kind](tmp_path / "whole")
    whole.train()
    cut = TASKS[kind](tmp_path / "cut")
    real = cut.train_step

    def step():
        if cut.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real()

    cut.train_step = step
    result = cut.train()
    assert result.reason == "SIGTERM" and cut.step == 3
    resumed = TASKS[kind](tmp_path / "cut")
    resumed.train()
    assert resumed.step == 6 and "resuming" in capsys.readouterr().out
    assert_same(tensors(tmp_path / "cut" / "step-0000006"), tensors(tmp_path / "whole" / "step-0000006"))
    found = records(tmp_path / "cut")
    assert found == records(tmp_path / "whole")
    assert {"step", "clips", "loss", "grad_norm", "lr"} <= set(found[-1])


def trained(trainer):
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", TASKS)
def test_a_damaged_checkpoint_is_passed_over(kind, tmp_path, capsys):
    TASKS[kind](tmp_path).train()
    (tmp_path / "step-0000006" / "model.safetensors").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="step-0000006 is damaged"):
        again = trained(TASKS[kind](tmp_path))
    assert "resuming" in (out := capsys.readouterr().out) and "step-0000003" in out
    assert again.step == 6 and list(tmp_path.glob("corrupt-step-0000006"))


@pytest.mark.parametrize("kind", TASKS)
def test_another_setting_is_refused_in_the_same_words(kind, tmp_path):
    trainer = TASKS[kind](tmp_path)
    trainer.train()
    trainer.close()
    other = TASKS[kind](tmp_path / "other")
    other.close()
    other.task.config = type(other.config)(**{**vars(other.config), "seed": 9})
    other.run_dir = tmp_path
    with pytest.raises(ValueError, match=r"^seed: .*step-0000006 was trained with \d, this run has 9; choose another"):
        other.resume()
