"""Losses, weights and samples are those recorded before (`python -m tests.golden.record` says how, and how exactly)."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from .cases import RUNS
from .record import NUMBERS, check, run

RECORDED = json.loads(NUMBERS.read_text(encoding="utf-8"))["cases"]


def test_every_case_is_recorded():
    assert set(RECORDED) == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_numbers_are_those_recorded(name):
    check(name, RECORDED[name])


@pytest.mark.parametrize("name", ["solver/heun/staggered fp64", "sample/video/window-2/heun fp64"])
def test_runs_repeat_to_the_bit_and_small_changes_are_seen(name):
    assert run(name) == run(name)
    other = copy.deepcopy(RECORDED[name])
    other["tensors"]["x"]["numbers"][0] *= 1 + (1e-9 if name.startswith("solver") else 1e-4)
    with pytest.raises(AssertionError, match="from what was recorded"):
        check(name, other)


def test_a_network_in_fp64_is_another_run():
    """The two dtypes are two computations: their records differ."""
    assert RUNS["train/video/teacher fp32"][1] == torch.float32
    one, other = (RECORDED[f"train/video/teacher {dtype}"]["tensors"]["weights"] for dtype in ("fp32", "fp64"))
    assert one["bits"] != other["bits"]
