"""Settings of a run on series and of the window study."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..checks import BelowOne, Checked, Count, Fraction, InnerFraction, Natural, NotNegative, Positive
from .orders import CHAINS, Kind, Order, check_order

if TYPE_CHECKING:
    import numpy as np

    from ..diffusion import schedules


@dataclass(frozen=True)
class Source(Checked):
    """A generator of series of one channel.

    Args:
        kind: "logistic", "stochastic" and "one-minus-x" are chains, in which each point follows from another:
            next = 3.993 p (1 - p), p + Bernoulli(1/2), 1 - p; the first is U(0, 1). "mixture" is `gen_dataset`;
            "white-noise" N(0, 1).
        length: points of a series.
        order: order of a chain's links along the series, see `permutation`.
        step: block size of "swaps" and "block-shuffle".
        chaos_ratio: of "mixture".
        order_seed: seed of the random orders.

    Raises:
        ValueError: a field breaks its rule.
    """

    kind: Kind = "logistic"
    length: int = 20
    order: Order = "natural"
    step: int = 1
    chaos_ratio: Fraction = 0.5
    order_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order, self.length, self.step)

    @property
    def has_clauses(self) -> bool:
        """Whether a series can be checked against its law, see `clause_error`."""
        return self.kind in CHAINS

    def permutation(self) -> np.ndarray:
        """See `data.permutation`."""
        from .data import permutation

        return permutation(self.order, self.length, self.step, self.order_seed)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """`count` series (count, length, 1); a larger count begins with the series of a smaller one."""
        from .data import draw_series

        return draw_series(self, count, seed)

    def clause_error(self, x: np.ndarray) -> np.ndarray:
        """See `data.clause_error`."""
        from .data import clause_error

        return clause_error(self, x)


@dataclass(frozen=True)
class SeriesModelConfig(Checked):
    """The network. B batch, N tokens (points of a series), C channels.

    Args:
        width: of the residual stream.
        layers: of the transformer.
        heads: of each layer's attention.
        expansion: hidden width of the feed-forward layers over `width`.
        prediction: what the network predicts.
        features: what a token is told about its noise beside x: "scales" (signal, noise), as in the reference, or
            "log_snr", an embedding that resolves the levels near both ends.

    Raises:
        ValueError: a field breaks its rule.
    """

    width: Count = 64
    layers: Count = 4
    heads: Count = 4
    expansion: Count = 4
    prediction: Literal["x0", "eps", "v"] = "v"
    features: Literal["scales", "log_snr"] = "log_snr"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width: must be even and a multiple of heads {self.heads}, got {self.width}")


@dataclass(frozen=True)
class ScheduleConfig(Checked):
    """When each point of a series is noised. t = 0 is data, t = 1 noise; generation runs from 1 to 0.

    Args:
        kind: what a network is trained on. "staggered": generation from left to right with `window` tokens in flight;
            "together": all at once; "independent": a random level for each token, so that the network can be sampled
            with any schedule; "mixed": all of `windows` in turn, so that it can be sampled with any of them.
        window: tokens in flight: 1 is autoregressive, infinity joint. Used in sampling only with "independent"
            and "mixed".
        windows: of "mixed".
        curve: log-SNR of a token while it is generated.
        start: log-SNR at t = 0 of the "log-linear" curve.
        end: log-SNR at t = 1 of the same curve.

    Raises:
        ValueError: a field breaks its rule.
    """

    kind: Literal["staggered", "together", "independent", "mixed"] = "independent"
    window: float = 8.0
    windows: tuple[float, ...] = (1, 2, 4, 8, 12, 16, 24, 64, 256)
    curve: Literal["log-linear", "vp-linear", "cosine"] = "log-linear"
    start: float = 9.2
    end: float = -4.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.window > 0:
            raise ValueError(f"window: must be positive, got {self.window}")
        if not self.windows or not all(window > 0 for window in self.windows):
            raise ValueError(f"windows: must be positive, at least one, got {self.windows}")
        if not (math.isfinite(self.start) and math.isfinite(self.end) and self.start > self.end):
            raise ValueError(f"start, end: must be finite, start above end, got {self.start} and {self.end}")

    def build(self, length: int) -> schedules.Schedule:
        """The schedule that series of `length` points are sampled with, variance preserving."""
        from ..diffusion import schedules

        if self.kind == "together":
            return schedules.Together((length,), self._curve())
        return schedules.Staggered(length, self.window, self._curve())

    def build_training(self, length: int) -> schedules.Schedule:
        """The schedule that the network is trained on."""
        from ..diffusion import schedules

        if self.kind == "independent":
            return schedules.Independent((length,), self._curve())
        if self.kind == "mixed":
            return schedules.Mixed([schedules.Staggered(length, window, self._curve()) for window in self.windows])
        return self.build(length)

    def _curve(self) -> schedules.Curve:
        from ..diffusion import schedules

        if self.curve == "log-linear":
            return schedules.LogLinear(self.start, self.end)
        return schedules.VPLinear() if self.curve == "vp-linear" else schedules.Cosine()


@dataclass(frozen=True, kw_only=True)
class SeriesTrainConfig(Checked):
    """A run.

    Args:
        run_dir: folder for checkpoints, metrics and curves; the same command resumes.
        data: .csv, .parquet or .npz file of series; "None" trains on `source`, with new series in every step.
        source: the generator.
        schedule: when each point is noised.
        model: the network.
        steps: optimizer steps.
        batch: series per step.
        lr: largest learning rate; it rises over `warmup` steps and then falls along a cosine to `final_lr` times it.
        warmup: steps.
        final_lr: last learning rate over `lr`.
        weight_decay: of AdamW.
        beta2: of AdamW.
        clip: gradient norm is cut to this.
        ema: decay per step of the average of weights, which is used for sampling.
        loss: "masked" counts the tokens whose log-SNR changes at the time drawn, "simple" all tokens; "vlb" weights
            them by -dλ/dt as the continuous ELBO does.
        loss_space: squared error of "x0", "eps" or "v"; "vlb" is always the ELBO.
        heldout_fraction: share of the file's series that is not trained on.
        checkpoint_every: steps between checkpoints; one more is written at the end.
        log_every: steps between lines of metrics.jsonl.
        keep: how many of the latest checkpoints to keep.
        tensorboard: also write TensorBoard curves.
        seed: of weights, data, times and noise.
        device: "auto" takes CUDA where there is one.

    Raises:
        ValueError: a field breaks its rule.
    """

    run_dir: Path = Path("runs/series")
    data: Path | None = None
    source: Source = field(default_factory=Source)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    model: SeriesModelConfig = field(default_factory=SeriesModelConfig)
    steps: Count = 4000
    batch: Count = 64
    lr: Positive = 2e-3
    warmup: Natural = 200
    final_lr: Fraction = 0.01
    weight_decay: NotNegative = 0.0
    beta2: BelowOne = 0.99
    clip: Positive = 1.0
    ema: BelowOne = 0.998
    loss: Literal["masked", "simple", "vlb"] = "masked"
    loss_space: Literal["x0", "eps", "v"] = "v"
    heldout_fraction: InnerFraction = 0.1
    checkpoint_every: Count = 1000
    log_every: Count = 100
    keep: Natural = 2
    tensorboard: bool = True
    seed: Natural = 0
    device: str = "auto"


SHARED, OWN = "one network", "a network per window"


class Line(NamedTuple):
    """The cells of one pretrained network: sampled as it is, or trained on each window first."""

    loss_space: str
    swap: int
    seed: int
    training: str


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Checked):
    """The grid, and the budget of each network.

    Args:
        windows: of the staggered schedule.
        swaps: steps of the "swaps" orders; 1 is the natural order.
        seeds: networks per loss, order and window.
        losses: the quantity whose squared error is the loss: "x0", as in the reference, or "v".
        own_losses: those of `losses` with which networks are also trained on each window separately.
        length: points of a series.
        base_steps: optimizer steps on independent levels, once per loss, order and seed.
        steps: optimizer steps on one window.
        batch: series per step.
        base_lr: learning rate on independent levels.
        lr: learning rate on one window.
        model: the network.
        samples: series per network for the clause errors.
        sampling_steps: of the ancestral solver.
    """

    windows: tuple[float, ...] = (1, 2, 4, 8, 12, 16, 24, 64, 256)
    swaps: tuple[int, ...] = (1, 4)
    seeds: tuple[int, ...] = (0, 1)
    losses: tuple[Literal["x0", "v"], ...] = ("x0", "v")
    own_losses: tuple[Literal["x0", "v"], ...] = ("x0",)
    length: Count = 20
    base_steps: Count = 1500
    steps: Count = 400
    batch: Count = 64
    base_lr: Positive = 3e-3
    lr: Positive = 1e-3
    model: SeriesModelConfig = field(default_factory=SeriesModelConfig)
    samples: Count = 256
    sampling_steps: Count = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("windows", "swaps", "seeds", "losses"):
            if not getattr(self, name):
                raise ValueError(f"{name}: must name at least one, got none")
        if not set(self.own_losses) <= set(self.losses):
            raise ValueError(f"own_losses: must be among losses {self.losses}, got {self.own_losses}")

    def lines(self) -> list[Line]:
        """A whole picture for one seed before the next seed begins."""
        return [
            Line(loss, swap, seed, training)
            for seed in self.seeds
            for loss, training in self.columns()
            for swap in self.swaps
        ]

    def columns(self) -> list[tuple[str, str]]:
        """(loss, training), in the order of the table."""
        columns: list[tuple[str, str]] = [(loss, SHARED) for loss in self.losses]
        return columns + [(loss, OWN) for loss in self.own_losses]

    def training(self, line: Line, window: float | None) -> SeriesTrainConfig:
        """Settings of the training on one window, or, for None, of that on independent levels."""
        from ..diffusion.noise import derive_seed

        if window is None:
            schedule, steps, lr = ScheduleConfig(kind="independent"), self.base_steps, self.base_lr
        else:
            schedule, steps, lr = ScheduleConfig(kind="staggered", window=float(window)), self.steps, self.lr
        # seeds differ from window to window: the second training must not see the first one's series again
        seed = line.seed if window is None else derive_seed(line.seed, round(window * 1000))
        return SeriesTrainConfig(
            source=Source(length=self.length, order="swaps", step=line.swap), schedule=schedule, model=self.model,
            steps=steps, batch=self.batch, lr=lr, warmup=min(50, steps // 4), loss_space=line.loss_space,  # type: ignore[arg-type]
            seed=seed, device="cpu",
        )  # fmt: skip
