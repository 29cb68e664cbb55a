"""`sae schedule`: every kind can be drawn and printed, and bad options are refused by name."""

from __future__ import annotations

import math

import pytest
import torch
import tyro
from sae_diffusion.diffusion.cli import SchedulePlot
from sae_diffusion.diffusion.plot import CURVES, plot_schedule, schedule_table
from sae_diffusion.diffusion.schedules import Columns, Rolling, Staggered, Together

KINDS = ["staggered", "together", "independent", "rolling", "triangular", "components", "columns", "rows"]


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_prints_a_table(kind, capsys):
    SchedulePlot(kind=kind).run()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[0].split()[:3] == ["t", "token", "0"]
    assert [line.split()[0] for line in lines[1:]] == [f"{i / 10:.3f}" for i in range(11)]


@pytest.mark.parametrize("curve", CURVES)
def test_every_curve(curve):
    assert SchedulePlot(curve=curve).schedule().curve == CURVES[curve]()


def test_table_holds_log_snr():
    table = schedule_table(Staggered(2, 1), rows=4)
    assert [[float(v) for v in line.split()] for line in table.splitlines()[1:]] == [
        [0.0, 9.2, 9.2], [0.25, 9.2, 2.3], [0.5, 9.2, -4.6], [0.75, 2.3, -4.6], [1.0, -4.6, -4.6]
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", [Staggered(20, 8), Together(), Columns((3, 8, 8), 0.5)], ids=["1d", "0d", "3d"])
def test_picture(tmp_path, schedule):
    path = plot_schedule(schedule, tmp_path / "new" / "schedule.png")
    width, height = png_size(path.read_bytes())
    assert width > 800
    assert height > 300


def test_command_line(tmp_path, capsys):
    picture = tmp_path / "out.png"
    arguments = ["--plot", str(picture), "--kind", "staggered", "--tokens", "12", "--window", "3", "--order", "reverse"]
    command = tyro.cli(SchedulePlot, args=arguments)
    schedule = command.schedule()
    assert (schedule.tokens, schedule.window, schedule.order.tolist()) == (12, 3.0, list(range(11, -1, -1)))
    command.run()
    assert capsys.readouterr().out.strip() == str(picture)
    png_size(picture.read_bytes())
    assert math.isinf(tyro.cli(SchedulePlot, args=["--window", "inf"]).schedule().window)
    assert isinstance(tyro.cli(SchedulePlot, args=["--kind", "rolling", "--window", "4"]).schedule(), Rolling)


def test_random_order_follows_the_seed():
    orders = [SchedulePlot(order="random", seed=seed).schedule().order for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rolling", "window": 2.5}, "window: must be a whole number of tokens for 'rolling', got 2.5"),
        ({"tokens": 0}, "tokens: must be at least 1, got 0"),
        ({"window": -1.0}, "window: must be positive, got -1.0"),
        ({"kind": "columns", "b": 1.0}, r"b: must be in \[0, 1\), got 1.0"),
        ({"start": -9.0}, "start: must be finite and greater than end"),
        ({"rows": 0}, "rows: must be at least 1, got 0"),
    ],
)
def test_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        SchedulePlot(**options).run()
