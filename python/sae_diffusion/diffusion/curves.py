"""One-dimensional noise curves: log-SNR lambda(u) and its slope for progress u in [0, 1], 0 clean and 1 noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch

from ..checks import Checked, NotNegative, Positive, Rule


class Curve(ABC):
    """lambda(u), finite and non-increasing on [0, 1].

    Attributes:
        scaling: the (signal, noise) scaling that belongs to the curve in the literature.
        corners: u at which the slope jumps.
    """

    scaling: ClassVar[str] = "vp"
    corners: tuple[float, ...] = ()

    @abstractmethod
    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        """lambda, of the shape and dtype of u."""

    @abstractmethod
    def slope(self, u: torch.Tensor) -> torch.Tensor:
        """d lambda / du."""


@dataclass(frozen=True)
class LogLinear(Curve):
    """lambda = start + u (end - start): the SNR falls exponentially from about 10^4 to 10^-2 by default."""

    start: float = 9.2
    end: float = -4.6

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end) and self.start > self.end):
            raise ValueError(f"start: must be finite and greater than end = {self.end}, got {self.start}")

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        return self.start + u * (self.end - self.start)

    def slope(self, u: torch.Tensor) -> torch.Tensor:
        return torch.full_like(u, self.end - self.start)


@dataclass(frozen=True)
class _Clipped(Checked, Curve):
    """A curve whose lambda is infinite at an end: u is clipped to [margin, 1 - margin] and the slope is 0 outside."""

    margin: Annotated[float, Rule("in (0, 0.5)", lambda margin: 0 < margin < 0.5)] = field(default=1e-3, kw_only=True)

    @property
    def corners(self) -> tuple[float, ...]:  # type: ignore[override]
        return (self.margin, 1 - self.margin)

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        return self._inner(u.clamp(*self._range))

    def slope(self, u: torch.Tensor) -> torch.Tensor:
        low, high = self._range
        return torch.where((u < low) | (u > high), 0.0, self._inner_slope(u.clamp(low, high)))

    @property
    def _range(self) -> tuple[float, float]:
        return (self.margin, 1 - self.margin)

    @abstractmethod
    def _inner(self, u: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _inner_slope(self, u: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class VPLinear(_Clipped):
    """signal^2 = exp(-(beta_min u + (beta_max - beta_min) u^2 / 2)) (Song et al. 2021, the VP-SDE).

    u below `margin` counts as `margin`, where lambda is 9.1 by default.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta_min < self.beta_max < math.inf:
            raise ValueError(f"beta_min: must lie in [0, beta_max = {self.beta_max}), got {self.beta_min}")

    @property
    def _range(self) -> tuple[float, float]:
        return (self.margin, 1.0)

    @property
    def corners(self) -> tuple[float, ...]:  # type: ignore[override]
        return (self.margin,)

    def _inner(self, u: torch.Tensor) -> torch.Tensor:
        # ln(s / (1 - s)) with s = exp(-x), without cancellation where s is close to 1 and no overflow where it is 0.
        x = self._exponent(u)
        return -x - torch.log(-torch.expm1(-x))

    def _inner_slope(self, u: torch.Tensor) -> torch.Tensor:
        rate = self.beta_min + (self.beta_max - self.beta_min) * u
        return rate / torch.expm1(-self._exponent(u))

    def _exponent(self, u: torch.Tensor) -> torch.Tensor:
        return u * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * u)


@dataclass(frozen=True)
class Cosine(_Clipped):
    """signal^2 = f(u) / f(0), f(u) = cos^2(pi / 2 (u + s) / (1 + s)) (Nichol and Dhariwal 2021, eq. 17)."""

    s: NotNegative = 0.008

    def _inner(self, u: torch.Tensor) -> torch.Tensor:
        angle, first = self._angles(u)
        # 1 - cos^2 A / cos^2 A0 = sin(A - A0) sin(A + A0) / cos^2 A0
        return 2 * angle.cos().log() - ((angle - first).sin() * (angle + first).sin()).log()

    def _inner_slope(self, u: torch.Tensor) -> torch.Tensor:
        angle, first = self._angles(u)
        rate = 0.5 * math.pi / (1 + self.s)
        return -rate * (2 * angle.tan() + 1 / (angle - first).tan() + 1 / (angle + first).tan())

    def _angles(self, u: torch.Tensor) -> tuple[torch.Tensor, float]:
        quarter = 0.5 * math.pi / (1 + self.s)
        return quarter * (u + self.s), quarter * self.s


@dataclass(frozen=True)
class Flow(_Clipped):
    """lambda = 2 ln((1 - u) / u): with scaling "flow" signal = 1 - u and noise = u (flow matching, rectified flow)."""

    scaling: ClassVar[str] = "flow"

    def _inner(self, u: torch.Tensor) -> torch.Tensor:
        return 2 * (torch.log1p(-u) - u.log())

    def _inner_slope(self, u: torch.Tensor) -> torch.Tensor:
        return -2 / (u * (1 - u))


@dataclass(frozen=True)
class EDM(Checked, Curve):
    """sigma = (sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, lambda = -2 ln sigma.

    Equidistant u are the noise levels of Karras et al. 2022, eq. 5 (without their last level 0).
    """

    scaling: ClassVar[str] = "ve"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: Positive = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"sigma_min: must lie in (0, sigma_max = {self.sigma_max}), got {self.sigma_min}")

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        low, high = self._roots()
        return -2 * self.rho * (low + u * (high - low)).log()

    def slope(self, u: torch.Tensor) -> torch.Tensor:
        low, high = self._roots()
        return -2 * self.rho * (high - low) / (low + u * (high - low))

    def _roots(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
