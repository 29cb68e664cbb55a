"""Settings: how noise levels are drawn in training, and how frames are drawn in sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..checks import Checked, Count, Finite, Natural, NotNegative, Positive

Solver = Literal["euler", "heun", "dpm++2m", "ancestral", "stochastic-heun"]
CHURNED: tuple[Solver, ...] = ("euler", "heun", "stochastic-heun")
MOST_STEPS = 2**16 - 2  # draws of noise are numbered with 16 bits, and one number is for the context


@dataclass(frozen=True)
class NoiseConfig(Checked):
    """How noise levels are drawn, in units of the normalised data (sigma_data = 1).

    Args:
        mean: of ln sigma of the noisy copies.
        std: of ln sigma of the noisy copies. Both defaults are those of the reference's latest training on pixels.
        context_sigma_max: the clean copy of a clip has noise of one level drawn from U(0, context_sigma_max), and the
            network is told that level, so that it learns to cope with its own imperfect frames.
        context_sigma_min: lowest level that the network is told for context (its logarithm must be finite).

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    mean: Finite = 0.0
    std: NotNegative = 2.0
    context_sigma_max: NotNegative = 0.5
    context_sigma_min: Positive = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        # so that squares of sigma stay finite in fp32 for all draws that can be expected
        if abs(self.mean) + 6 * self.std > 40:
            raise ValueError(f"mean, std: must satisfy |mean| + 6 std <= 40, got {self.mean} and {self.std}")


@dataclass(frozen=True)
class OwnContextConfig(Checked):
    """When and how training shows the network its own frames as context, see `with_own_frames`.

    Args:
        start: first optimizer step with own frames; None = never.
        ramp: optimizer steps over which the largest share of own frames in a clip rises from 0 to 1.
        given: number of first frames of a clip that stay as recorded.
        sigma_min: smallest noise level from which a frame starts.
        sigma_max: largest noise level from which a frame starts.
        steps: Euler steps for a frame.
        depth: the frames are made up to this many times, each time from a context with the previous ones.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    start: Count | None = None
    ramp: Natural = 0
    given: Count = 2
    sigma_min: Positive = 3.0
    sigma_max: Positive = 15.0
    steps: Count = 1
    depth: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_max < self.sigma_min:
            raise ValueError(f"sigma_max: must be at least sigma_min = {self.sigma_min}, got {self.sigma_max}")


@dataclass(frozen=True)
class SamplerConfig(Checked):
    """How a frame is drawn.

    Args:
        sampling_steps: N noise levels; a block takes 2N - 1 network evaluations with "heun" and "stochastic-heun", N
            with the others (twice as many if guidance is not 1), and one more to enter the cache.
        sigma_min: the last noise level before 0.
        sigma_max: the first noise level.
        rho: density of the levels near sigma_min, see `sigma_schedule`.
        churn: S_churn of EDM algorithm 2, noise added between steps of "euler", "heun" and "stochastic-heun"; None is
            40 for the last one and 0, no noise, for the others.
        churn_min: smallest noise level that is churned.
        churn_max: largest noise level that is churned.
        churn_noise: S_noise, a factor on the added noise.
        solver: "euler" (first order), "heun" (second order), "dpm++2m" (second order, one evaluation a step),
            "ancestral" (stochastic: draws from the posterior of each step), or "stochastic-heun" ("heun" with churn).
        context_sigma: noise level that the network is told for frames in the cache.
        context_noise: standard deviation of the noise that is added to frames before they enter the cache.
        guidance: w in D = D_weak + w (D - D_weak); 1 is off.
        guidance_kind: where D_weak comes from: "context", the same network without the past, or "auto", a second
            network with the same past (Karras et al. 2024, autoguidance).

    Raises:
        ValueError: a field breaks its rule.
    """

    sampling_steps: Count = 32
    sigma_min: Finite = 0.002
    sigma_max: Finite = 80.0
    rho: Positive = 7.0
    churn: NotNegative | None = None
    churn_min: NotNegative = 0.0
    churn_max: float = math.inf
    churn_noise: NotNegative = 1.0
    solver: Solver = "heun"
    context_sigma: Positive = 0.05
    context_noise: NotNegative = 0.0
    guidance: Finite = 1.0
    guidance_kind: Literal["context", "auto"] = "context"

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, rule: str) -> None:
            if not holds:
                raise ValueError(f"{name}: must be {rule}, got {getattr(self, name)!r}")

        super().__post_init__()
        require("sampling_steps", self.sampling_steps <= MOST_STEPS, f"at most {MOST_STEPS}")
        require("sigma_min", 0 < self.sigma_min <= self.sigma_max, f"in (0, sigma_max = {self.sigma_max}]")
        if self.solver == "stochastic-heun":
            require("churn", self.churn_amount > 0, "> 0 for solver 'stochastic-heun'")
        if self.solver not in CHURNED:
            require("churn", self.churn_amount == 0, f"0 for solver {self.solver!r}")
        require("churn_max", self.churn_max >= self.churn_min, f"at least churn_min = {self.churn_min}")

    @property
    def churn_amount(self) -> float:
        """S_churn, with the default that None stands for."""
        return (40.0 if self.solver == "stochastic-heun" else 0.0) if self.churn is None else self.churn
