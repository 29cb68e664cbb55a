"""Schedules of image components by name, for configurations and checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ..diffusion.schedules import Columns, ComponentLinear, LogLinear, Rows, Schedule, check_schedule
from .components import Whitened


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise levels of whitened components over time.

    Args:
        kind: "components" orders them by falling variance (GUD's linear schedule); "columns" from left to right and
            "rows" from top to bottom, of the image in the identity basis and of the grid of components in others.
        softness: of "components", the inverse of GUD's a. inf gives all components the same log-SNR, 1 is standard
            diffusion with equal noise in the data, towards 0 components are generated one after another.
        b: of "columns" and "rows": 0 all together, towards 1 one after another.
        start, end: log-SNR of the last component at t = 0, and of the first one at t = 1.
        least, most: log-SNR rests beyond these, where nothing is left to learn but noise for the loss; standard
            diffusion (softness 1) never rests.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    kind: Literal["components", "columns", "rows"] = "components"
    softness: float = 1.0
    b: float = 0.5
    start: float = 7.0
    end: float = -5.0
    least: float = -8.0
    most: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in ("components", "columns", "rows"):
            raise ValueError(f"kind: must be components, columns or rows, got {self.kind!r}")
        if not self.softness > 0:
            raise ValueError(f"softness: must be positive (inf for equal log-SNR), got {self.softness}")
        if not 0 <= self.b < 1:
            raise ValueError(f"b: must lie in [0, 1), got {self.b}")
        for name in ("start", "end", "least", "most"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: must be finite, got {getattr(self, name)}")
        if not self.least <= self.end < self.start <= self.most:
            raise ValueError(
                "start, end: must satisfy least <= end < start <= most, "
                f"got {self.least}, {self.end}, {self.start}, {self.most}"
            )


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
