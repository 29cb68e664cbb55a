"""The steps of the solvers, token by token: from x at the levels `now` to x at the cleaner levels `then`.

a, s are signal and noise of a token, lambda its log-SNR, t stands for `now` and p for `then`, and
c = 1 - exp(lambda_t - lambda_p). Coefficients are made in fp64 per token and rounded to the dtype of x.
`solvers.sample` takes these steps with tensors, `sampler` with video and a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..checks import Checked, NotNegative
from .posterior import fresh_fraction
from .schedules import expand_to, scales_of


class Level:
    """Log-SNR, signal and noise of every token, fp64 (1, *shape)."""

    def __init__(self, log_snr: torch.Tensor, scaling: str) -> None:
        self.log_snr, self.scaling = log_snr, scaling
        self.signal, self.noise = scales_of(log_snr, scaling)

    def eps(self, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """eps_hat = (x - a x0_hat) / s."""
        return times(1 / self.noise, x) - times(self.signal / self.noise, x0)

    def raised(self, gamma: torch.Tensor) -> tuple[Level, torch.Tensor]:
        """The level whose sigma = s / a is 1 + gamma times this one's; the deviation of the noise that leads there."""
        level, sigma = Level(self.log_snr - 2 * torch.log1p(gamma), self.scaling), (-0.5 * self.log_snr).exp()
        return level, level.signal * sigma * ((1 + gamma).square() - 1).sqrt()


class Sigma(Level):
    """Levels in the scaling "ve", a = 1 and s = sigma, given by sigma itself, which may be 0."""

    def __init__(self, sigma: torch.Tensor) -> None:
        self.log_snr, self.scaling = -2 * sigma.log(), "ve"
        self.signal, self.noise = torch.ones_like(sigma), sigma

    def eps(self, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        return (x - x0) / _like(self.noise, x)

    def raised(self, gamma: torch.Tensor) -> tuple[Level, torch.Tensor]:
        level = Sigma(self.noise * (1 + gamma))
        return level, (level.noise.square() - self.noise.square()).sqrt()


class At(NamedTuple):
    """A state, its level and the network's estimate of it."""

    x: torch.Tensor
    level: Level
    x0: torch.Tensor

    @property
    def eps(self) -> torch.Tensor:
        return self.level.eps(self.x, self.x0)


Normals = Callable[[], torch.Tensor]  # standard normals like x, drawn by the steps that need them
Step = Callable[[At, Level, At | None, Normals], torch.Tensor]


def euler(now: At, then: Level, last: At | None, normals: Normals) -> torch.Tensor:
    """A step of the probability-flow ODE dx = x0_hat da + eps_hat ds."""
    return _along(now, then, now.x0, now.eps)


def trapezoid(now: At, then: At) -> torch.Tensor:
    """Heun's second half: the same step with the means of both ends' estimates, `then` reached by `euler`."""
    return _along(now, then.level, 0.5 * (now.x0 + then.x0), 0.5 * (now.eps + then.eps))


def _along(now: At, then: Level, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    return now.x + times(then.signal - now.level.signal, x0) + times(then.noise - now.level.noise, eps)


def multistep(now: At, then: Level, last: At | None, normals: Normals) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022): x0_hat extrapolated from the step before, which began at `last`.

    First order for a token that did not move in the last step, and for a step to noise 0; the extrapolation is limited
    to twice the last change of x0_hat, which matters where the last step was less than a quarter of this one.
    """
    # h is the step in ln(a / s) = lambda / 2.
    h = 0.5 * (then.log_snr - now.level.log_snr)
    guess = now.x0
    if last is not None:
        h_last = 0.5 * (now.level.log_snr - last.level.log_snr)
        ahead = torch.where((h_last > 0) & h.isfinite(), h / (2 * h_last), 0.0).clamp(max=2.0)
        guess = now.x0 + times(ahead, now.x0 - last.x0)
    return times(then.noise / now.level.noise, now.x) - times(then.signal * torch.expm1(-h), guess)


def ancestral(now: At, then: Level, last: At | None, normals: Normals) -> torch.Tensor:
    """A draw from q(x_p | x_t, x0_hat): mean (a_p / a_t) (1 - c) x + a_p c x0_hat, variance s_p^2 c."""
    spread = then.noise * fresh_fraction(then.log_snr, now.level.log_snr).sqrt()
    return _posterior_mean(now, then) + times(spread, normals())


def ddpm(now: At, then: Level, last: At | None, normals: Normals) -> torch.Tensor:
    """The same mean with the greater variance of Ho et al. 2020, exact for data N(0, 1).

    It is beta(p, t) = 1 - alpha(t) / alpha(p) times a_p^2 + s_p^2, alpha = sigmoid(lambda).
    """
    log_alpha = torch.nn.functional.logsigmoid
    beta = -torch.expm1(log_alpha(now.level.log_snr) - log_alpha(then.log_snr))
    spread = ((then.signal.square() + then.noise.square()) * beta).sqrt()
    return _posterior_mean(now, then) + times(spread, normals())


def _posterior_mean(now: At, then: Level) -> torch.Tensor:
    fresh = fresh_fraction(then.log_snr, now.level.log_snr)
    return times(then.signal / now.level.signal * (1 - fresh), now.x) + times(then.signal * fresh, now.x0)


def ddim(now: At, then: Level, last: At | None, normals: Normals, *, eta: float = 0.0) -> torch.Tensor:
    """a_p x0_hat + sqrt(s_p^2 - v) eps_hat plus noise of variance v = eta^2 s_p^2 c.

    eta = 1 is `ancestral`, eta = 0 is `euler`.
    """
    fresh = eta**2 * fresh_fraction(then.log_snr, now.level.log_snr)
    new = times(then.signal, now.x0) + times(then.noise * (1 - fresh).sqrt(), now.eps)
    return new + times(then.noise * fresh.sqrt(), normals()) if eta else new


STEPS: dict[str, Step] = {
    "ancestral": ancestral, "ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": euler, "dpm++2m": multistep,
    "stochastic-heun": euler,
}  # fmt: skip
CORRECTED = ("heun", "stochastic-heun")  # by `trapezoid`, with a second evaluation


@dataclass(frozen=True)
class Churn(Checked):
    """Noise added before a step (EDM, algorithm 2), token by token.

    Args:
        amount: S_churn, spread over the steps in which a token moves.
        least, greatest: S_tmin, S_tmax, on sigma = noise / signal of the token.
        factor: S_noise.
    """

    amount: NotNegative = 40.0
    least: NotNegative = 0.0
    greatest: float = math.inf
    factor: NotNegative = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.greatest >= self.least:
            raise ValueError(f"greatest: must be >= least = {self.least}, got {self.greatest}")

    def add(
        self, x: torch.Tensor, level: Level, steps: Any, normals: Normals, moves: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Level]:
        """x with noise added, and its levels; a token takes `steps` steps in total; only those in `moves` change."""
        gamma = (self.amount / torch.as_tensor(steps).double().clamp(min=1)).clamp(max=math.sqrt(2) - 1)
        sigma = level.noise / level.signal
        churned = (sigma >= self.least) & (sigma <= self.greatest)
        gamma = torch.where(churned if moves is None else churned & moves, gamma, 0.0)
        raised, spread = level.raised(gamma)
        return times(raised.signal / level.signal, x) + times(spread * self.factor, normals()), raised


def times(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A factor for each token."""
    return _like(factor, x) * x


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values of tokens, shaped like x and on its device, copied without synchronising an accelerator."""
    return expand_to(values, x).to(x, non_blocking=True)
