"""Every way to train on a clip runs, whatever the network's preconditioning is built on."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import scaling, train_step


@pytest.mark.parametrize("prior", ["data", "previous-frame"])
def test_every_contender_runs(monkeypatch, prior):
    monkeypatch.setattr(train_step, "NANO", dataclasses.replace(train_step.NANO, prior=prior))
    problem = scaling.build({"preset": "nano", "T": 3, "dtype": "fp32"}, "cpu")
    batch = problem.make_inputs(0)
    for contender in problem.contenders:
        for run in contender.launch.values():
            run(batch)
