"""Schedules of image components by name, for configurations and checkpoints."""

from __future__ import annotations

import torch

from ..diffusion.schedules import Columns, ComponentLinear, LogLinear, Rows, Schedule, check_schedule
from .components import Whitened
from .config import ScheduleConfig


def make_schedule(config: ScheduleConfig, basis: Whitened) -> Schedule:
    """The schedule of the components of `basis`, variance preserving, checked."""
    if config.kind == "components":
        schedule: Schedule = ComponentLinear(
            torch.ones(basis.shape, dtype=torch.float64), 1.0 / config.softness, basis.ordering(),
            start=config.start, end=config.end, clip=None if config.softness == 1 else (config.least, config.most),
        )  # fmt: skip
    else:
        lines = Columns if config.kind == "columns" else Rows
        schedule = lines(basis.shape, config.b, LogLinear(config.start, config.end))
    check_schedule(schedule)
    return schedule


def in_flight(schedule: Schedule, *, low: float = -4.0, high: float = 6.0, points: int = 2001) -> float:
    """Mean share of components with log-SNR strictly within (low, high), over the times at which there are any.

    1 / (number of components) is autoregressive, 1 is joint.
    """
    values = schedule.log_snr(torch.linspace(0, 1, points, dtype=torch.float64)).flatten(1)
    share = ((values > low) & (values < high)).double().mean(1)
    return float(share[share > 0].mean())
