"""`make gpu` starts: a dry run of the whole script on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ROOT, gpu

STEPS = ["environment", "build", "tests", "sanitizer", "benchmarks", "tables"]


def test_dry_run_takes_every_step_home(tmp_path):
    out = tmp_path / "out"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--dry"],
        cwd=ROOT, env=env | {"GPU_OUT": str(out), "GPU_BUDGET_S": "4000"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert [s["step"] for s in summary["steps"]] == STEPS
    assert {s["step"]: s["status"] for s in summary["steps"]}.items() >= {
        "environment": "ok", "tests": "ok", "benchmarks": "ok", "tables": "ok",
    }.items()  # fmt: skip
    assert summary["budget_s"] == 4000 and summary["torch"] and summary["compute_sanitizer"]
    result = json.loads((out / "benchmarks.json").read_text())
    assert result["complete"] and all(c["gate"]["ok"] and c["results"] for c in result["cases"])
    reasons = [m["reason"] for c in result["cases"] for m in c["missing"]]
    assert not [r for r in reasons if r.startswith("could not run")] and not any(c["wrong"] for c in result["cases"])
    assert {c["op"] for c in result["cases"]} == {
        "attention", "convolution", "train-step", "noise", "magnitude", "qk-prepare", "sampling", "scaling",
    }  # fmt: skip
    assert "frame_attention on cpu" in (out / "report.txt").read_text()
    assert "Not yet measured on a GPU" in (out / "tables.md").read_text()


def session(folder: Path, budget: float = 60.0) -> gpu.Session:
    return gpu.Session(folder, budget, "cpu", dry=True)


def test_no_gpu_fails_with_the_reason(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "PyTorch sees no CUDA device" in capsys.readouterr().out
    (step,) = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert step["status"] == "failed"


def test_commands_are_stopped_at_their_limit_and_leave_their_log(tmp_path):
    run = session(tmp_path)
    assert run.command("slow", ["sh", "-c", "echo begun; exec sleep 600"], 3.0) == -1
    assert run.steps[-1]["status"] == "out of time"
    assert (tmp_path / "slow.log").read_text() == "begun\n"


@pytest.mark.parametrize(("code", "fine", "status"), [(0, (0,), "ok"), (5, (0, 5), "ok"), (3, (0, 5), "failed")])
def test_exit_statuses(code, fine, status, tmp_path):
    run = session(tmp_path, 600.0)
    run.command("step", [sys.executable, "-c", f"raise SystemExit({code})"], 600, fine=fine)
    assert run.steps[-1]["status"] == status
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == run.steps


def test_missing_sanitizer_fails_only_where_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    for asked, status in ((False, "skipped"), (True, "failed")):
        run = session(tmp_path)
        gpu.sanitizer(run, asked)
        assert run.steps[-1] == {
            "step": "sanitizer", "status": status, "detail": "compute-sanitizer is not on the PATH", "seconds": 0.0,
        }  # fmt: skip


def test_make_gpu_uses_neither_the_virtual_environment_nor_set_up():
    text = (ROOT / "Makefile").read_text()
    _, _, recipe = text.partition("\ngpu:")
    assert recipe.splitlines()[:2] == ["", "\t$(PYTHON) -m benchmarks.gpu"]
