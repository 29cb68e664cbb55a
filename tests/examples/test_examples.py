"""Every script in examples/ runs, small."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from sae_kernels import FrameLayout, causal_conv3d
from sae_kernels.testing import assert_within_budget

EXAMPLES = Path(__file__).parents[2] / "examples"
# What each is run with, and what it must say.
RUNS = {
    "attention_transformer.py": ("--steps 2 --batch 2 --frames 4 --device cpu", "error of the next two frames"),
    "own_arrays.py": ("--steps 2 --episodes 12 --device cpu", r"step 2, .*step-0000002[\s\S]*rollout.gif"),
    "token_schedules.py": ("--steps 2 --batch 4 --samples 4 --solver-steps 8", "window inf: .*\nsecond half"),
    "throughput.py": ("--frames 3 --grid 4 4 --channels 8 --rounds 1 --device cpu", "frame_attention .* ms"),
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_runs(name, tmp_path, monkeypatch, capsys):
    arguments, said = RUNS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *arguments.split()])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_the_convolution_that_throughput_compares_with_is_the_same_function(copies):
    apart = runpy.run_path(str(EXAMPLES / "throughput.py"))["streams_apart"]
    layout = FrameLayout(4, 25, noisy_copies=copies)
    x, weight = torch.randn(2, 3, layout.total_frames, 5, 5), torch.randn(4, 3, 3, 3, 3)
    gold = causal_conv3d(x.double(), weight.double(), layout, impl="reference")
    assert_within_budget(apart(x, weight, layout), gold, causal_conv3d(x, weight, layout, impl="reference"))
