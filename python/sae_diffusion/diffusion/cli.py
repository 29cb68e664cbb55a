"""The command `sae schedule`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..checks import Count, check_fields

if TYPE_CHECKING:
    from .schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class SchedulePlot:
    """Show a noise schedule: log-SNR of every token against t (0 data, 1 noise), as a table or as a picture.

    Args:
        kind: of schedule. "components" is GUD's linear one, for variances that fall from 1 as 1 / (1 + k)^2.
        curve: log-SNR while a token is generated; "components" has its own.
        tokens: number of tokens.
        window: tokens in flight, of "staggered" (inf for all at once) and "rolling".
        order: order of generation of "staggered" and "triangular"; "random" is drawn with --seed.
        steps_per_token: of "triangular".
        lag: macro steps between two tokens of "triangular".
        a: of "components": 0 gives all the same SNR, 1 is standard diffusion, and above 1 they come in sequence.
        b: of "columns" and "rows", in [0, 1): 0 is all at once; near 1 they come one after another.
        size: height and width of "columns" and "rows".
        start: log-SNR at t = 0 of the log-linear curve and of "components".
        end: log-SNR at t = 1 of both.
        scaling: "vp", "ve" or "flow"; "None" takes that of the curve.
        rows: steps in t that the table shows.
        plot: picture to write (png, pdf, svg); "None" prints a table.
        seed: of --order random.
        device: accepted for consistency; schedules are made on the CPU.
        debug: show the traceback of an error.
    """

    kind: Literal[
        "staggered", "together", "independent", "rolling", "triangular", "components", "columns", "rows"
    ] = "staggered"  # fmt: skip
    curve: Literal["log-linear", "vp-linear", "cosine", "edm", "flow"] = "log-linear"
    tokens: Count = 20
    window: float = 8.0
    order: Literal["natural", "reverse", "random"] = "natural"
    steps_per_token: int = 10
    lag: int = 2
    a: float = 2.0
    b: float = 0.5
    size: tuple[int, int] = (8, 8)
    start: float = 9.2
    end: float = -4.6
    scaling: Literal["vp", "ve", "flow"] | None = None
    rows: Count = 10
    plot: Path | None = None
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def schedule(self) -> Schedule:
        """The schedule that the options describe.

        Raises:
            ValueError: an option breaks its rule.
        """
        import torch

        from .plot import CURVES
        from .schedules import (
            Columns,
            ComponentLinear,
            Independent,
            LogLinear,
            Rolling,
            Rows,
            Staggered,
            Together,
            Triangular,
        )

        curve = LogLinear(self.start, self.end) if self.curve == "log-linear" else CURVES[self.curve]()
        if self.kind in ("together", "independent"):
            make = Together if self.kind == "together" else Independent
            return make((self.tokens,), curve, scaling=self.scaling)
        if self.kind == "rolling":
            if not (math.isfinite(self.window) and self.window == int(self.window)):
                raise ValueError(f"window: must be a whole number of tokens for 'rolling', got {self.window}")
            return Rolling(int(self.window), curve, scaling=self.scaling)
        if self.kind in ("columns", "rows"):
            lines = Columns if self.kind == "columns" else Rows
            return lines((1, *self.size), self.b, curve, scaling=self.scaling)
        if self.kind == "components":
            variances = (1 + torch.arange(self.tokens, dtype=torch.float64)) ** -2
            return ComponentLinear(variances, self.a, start=self.start, end=self.end, scaling=self.scaling or "vp")
        order = torch.arange(self.tokens)
        if self.order == "reverse":
            order = order.flip(0)
        elif self.order == "random":
            order = torch.randperm(self.tokens, generator=torch.Generator().manual_seed(self.seed))
        if self.kind == "triangular":
            return Triangular(self.tokens, self.steps_per_token, self.lag, curve, order=order, scaling=self.scaling)
        return Staggered(self.tokens, self.window, curve, order=order, scaling=self.scaling)

    def run(self) -> None:
        check_fields(self)
        from .plot import plot_schedule, schedule_table
        from .schedules import check_schedule

        schedule = self.schedule()
        check_schedule(schedule)
        if self.plot is None:
            print(schedule_table(schedule, self.rows))
        else:
            print(plot_schedule(schedule, self.plot))
