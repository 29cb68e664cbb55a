"""What a run is said to need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sae_diffusion.dry_run import Needs, measure
from sae_diffusion.train.config import TrainConfig
from train_stubs import STATS, Stub, StubClips

CONFIG = TrainConfig(
    clip_length=3, batch_size=4, micro_batch=1, device="cpu", num_workers=0, steps=7200, ema_stds=(0.05, 0.1, 0.2)
)


def test_memory_is_counted():
    """Exactly, that of the weights; what is kept for the backward pass grows evenly with the micro-batch."""
    needs = {size: measure(replace(CONFIG, micro_batch=size), Stub(), StubClips(), STATS) for size in (1, 2, 4)}
    weights = 4 * sum(p.numel() for p in Stub().parameters())
    for size in needs:
        assert needs[size].state == weights * 7 and needs[size].peak is None
    kept = {size: found.backward for size, found in needs.items()}
    assert kept[4] - kept[2] == 2 * (kept[2] - kept[1]) > 0
    # at least the hidden layer of all frames, before and after its nonlinearity
    assert kept[4] - kept[2] >= 2 * (2 * 3 * 8 * 4 * 4 * 4) * 2


def test_time_and_memory_are_said_for_people():
    needs = Needs(CONFIG, torch.device("cpu"), "fp32", 2, 3 << 20, 5 << 30, None, 0.5, 0.25)
    memory, time = needs.lines()
    assert memory == (
        "memory on cpu: 3 MiB for weights, gradients, optimizer and 3 averages, 5 GiB for the backward pass of a "
        "micro-batch of 1 clip"
    )
    assert time == (
        "time: 0.5 s a step, 7200 steps take about 1:00:00; reading the clips of a step takes 0.5 s, before each step"
    )
    memory, time = replace(
        needs, config=replace(CONFIG, micro_batch=2, num_workers=2), backward=None, peak=1 << 30
    ).lines()
    assert memory.endswith("averages, 1 GiB at most in a step of micro-batches of 2 clips") and time.endswith(
        "takes 0.25 s, in parallel (--num-workers 2)"
    )


def test_a_loss_that_is_not_finite_is_an_error():
    model = Stub()
    with torch.no_grad():
        model.out.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="loss: must be finite in the first steps"):
        measure(CONFIG, model, StubClips(), STATS)
