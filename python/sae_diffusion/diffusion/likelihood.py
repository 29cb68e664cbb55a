"""Exact log-likelihood by the probability-flow ODE, for every token or component at its own noise level.

Components c = basis(x) are noised as x_t = signal c + noise eps with log-SNR lambda(t) each. In variance-preserving
coordinates y = x_t / hypot(signal, noise), whatever the scaling, the flow of the marginal densities is

    dy/dt = lambda'/2 (s x0_hat - s^2 y),  s^2 = sigmoid(lambda),

and d log p(y)/dt = - div(dy/dt) along it (Chen et al. 2018; Song et al. 2021, eq. 39). So
log p(y_0) = log p(y_1) + integral of the divergence over t from 0 to 1, with y_1 where the flow takes y_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import AtLeastTwo, Count, check_choice, check_value
from .bases import Basis
from .schedules import Schedule, expand_to, scales_of

# Slopes are evaluated (in fp64) at least this fraction of a piece away from its ends, where they may jump.
_INSIDE = 1e-9
# A kink this close to the one before it is left to the solver's step control; so there are at most 1000 pieces.
_SHORTEST_PIECE = 1e-3


@dataclass(frozen=True)
class Prior:
    """Moments of the data's components, from which `log_likelihood` makes the marginal at t = 1.

    Args:
        mean: broadcast to a sample's shape.
        variance: broadcast likewise, at least 0.
        covariance: (D, D) of the flattened components, instead of the variance.
    """

    mean: Tensor | float = 0.0
    variance: Tensor | float = 1.0
    covariance: Tensor | None = None


def log_likelihood(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    schedule: Schedule,
    *,
    basis: Basis | None = None,
    divergence: str = "exact",
    probes: int = 1,
    seed: int = 0,
    prior: Prior | None = None,
    data_end: str = "smoothed",
    tolerance: float | None = None,
    method: str = "dopri5",
    callback: Callable[[float], None] | None = None,
) -> Tensor:
    """log p(x) of each sample in nats (B,), a density over data x; the basis's change of variables is included.

    The two ends of the flow, where log-SNR is finite:

    * t = 1: the marginal is taken as N(signal mean, signal^2 variance + noise^2) for each component, which is exact for
      independent normal components and close where the signal is weak. The default is that of unit-variance data,
      for which it is N(0, 1) under "vp"; `Prior(*component_moments(...))` is a better one; Prior(variance=0) is
      N(0, noise^2). With a covariance it is N(signal mean, signal covariance signal + noise^2), exact for any normal
      data.
    * t = 0, "smoothed": the density is that of the data with noise of deviation exp(-lambda(0)/2) on each component.
      "bound": a lower bound of the likelihood of the generative model that ends with one draw from
      N(x0_hat(x_0), exp(-lambda(0))): E over x_0 ~ q(x_0|c) of log p(x_0) + log p(c|x_0) - log q(x_0|c), with one draw.

    The solver's step is chosen for the batch as a whole. Pieces of the schedule between `schedule.breakpoints()` are
    integrated one by one.

    Args:
        denoise: (x_t, log_snr) -> x0_hat in component space; x_t like components (B, *shape), in the schedule's
            scaling, log_snr (B, *schedule.shape). Samples must not influence each other.
        x: data (B, *shape), fp32 or fp64, the dtype of the computation.
        schedule: over the components.
        basis: None for the identity.
        divergence: "exact", a backward pass for each of the D components; "rademacher", unbiased, `probes` passes.
        probes: draws z of independent signs, E z z^T = 1; z^T J z is averaged over them.
        seed: of the probes and of the draw of the bound.
        prior: moments of the components; None = `Prior()`.
        tolerance: rtol and atol of `torchdiffeq.odeint`; None = 1e-6 in fp64, which is accurate to about 1e-4 bits per
            dimension for Gaussians, and 1e-5 in fp32.
        method: one of its adaptive methods.
        callback: called with each time t that is reached from 0 to 1.

    Raises:
        ValueError, TypeError: an argument breaks its rule.
    """
    check_choice("divergence", divergence, ("exact", "rademacher"))
    check_choice("data_end", data_end, ("smoothed", "bound"))
    check_value("probes", probes, Count)
    size = math.prod(x.shape[1:])
    prior = Prior() if prior is None else prior
    if prior.covariance is not None and tuple(prior.covariance.shape) != (size, size):
        raise ValueError(f"prior.covariance: must be (D, D) = {(size, size)}, got {tuple(prior.covariance.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: must be float32 or float64, got {x.dtype}")
    if x.ndim < 2 or x.shape[0] < 1:
        raise ValueError(f"x: must be a batch (B, *shape), got {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError("x: must be finite, got NaN or infinity")
    with torch.no_grad():
        components = x if basis is None else basis.forward(x)
        generator = torch.Generator().manual_seed(seed)
        flow = _Flow(denoise, schedule, components, divergence, probes, generator)
        flow.callback = callback
        start, start_term = _data_end(flow, components, data_end, generator)
        if tolerance is None:
            tolerance = 1e-6 if x.dtype == torch.float64 else 1e-5
        end, gained = flow.solve(start, tolerance, method)
        log_p = _prior_term(flow, end, prior) + gained + start_term
        return log_p if basis is None else log_p + basis.log_det


def bits_per_dim(log_density: Tensor, dims: int, log_det: float | Tensor = 0.0) -> Tensor:
    """- (log_density + log_det) / (dims ln 2).

    Args:
        log_density: nats (B,) of `log_likelihood` for samples of `dims` numbers.
        log_det: log |det dx / d data| of all transforms of the data, see `dequantise` and `standardise_log_det`.
            For data of integers k in 0 .. levels - 1 this makes the result a bound in bits for each integer: with
            levels = 256 and x in [-1, 1) it is - log2 p / D + 7.
    """
    check_value("dims", dims, Count)
    return -(log_density + log_det) / (dims * math.log(2))


def dequantise(values: Tensor, levels: int = 256, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integers k in 0 .. levels - 1 -> 2 (k + u) / levels - 1 in [-1, 1), u uniform in [0, 1).

    The log-determinant is that of `dequantise_log_det`. E over u of log p(x) + log_det bounds log P(k) from below
    (Theis et al. 2016).

    Raises:
        ValueError: a value is not an integer or out of range.
    """
    check_value("levels", levels, AtLeastTwo)
    if values.is_floating_point() and not torch.equal(values, values.round()):
        raise ValueError("values: must be integers, got fractions")
    if values.numel() and (values.min() < 0 or values.max() >= levels):
        raise ValueError(
            f"values: must be in 0 .. levels - 1 = {levels - 1}, got {values.min().item()} to {values.max().item()}"
        )
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device)
    return ((values + u) * (2 / levels) - 1).to(dtype)


def dequantise_log_det(levels: int, dims: int) -> float:
    """dims log(2 / levels), of `dequantise`."""
    return dims * math.log(2 / levels)


def standardise_log_det(deviation: Tensor, shape: Sequence[int]) -> float:
    """- sum of log deviation over a sample of `shape`, of x = (data - mean) / deviation; deviation is broadcast."""
    if not (deviation > 0).all():
        raise ValueError(f"deviation: must be positive, got {deviation.min().item()}")
    return -float(deviation.double().log().expand(tuple(shape)).sum())


class _Flow:
    """The flow in variance-preserving coordinates y (B, *shape), and its divergence."""

    def __init__(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        schedule: Schedule,
        components: Tensor,
        divergence: str,
        probes: int,
        generator: torch.Generator,
    ) -> None:
        self.denoise, self.schedule = denoise, schedule
        self.callback: Callable[[float], None] | None = None
        self.shape, self.dtype, self.device = components.shape, components.dtype, components.device
        size = components[0].numel()
        # [probes, 1 or B, *shape]
        if divergence == "exact":
            z = torch.eye(size, dtype=self.dtype).view(size, 1, *self.shape[1:])
            self.probe_weight = 1.0
        else:
            z = torch.randint(0, 2, (probes, *self.shape), generator=generator).to(self.dtype) * 2 - 1
            self.probe_weight = 1.0 / probes
        self.probes = z.to(self.device)

    def log_snr(self, t: float | Tensor) -> Tensor:
        """(B, *schedule.shape) at one time."""
        return self._at(self.schedule.log_snr, t)

    def _at(self, function: Callable[[Tensor], Tensor], t: float | Tensor) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float64, device=self.device).view(1)
        values = function(time)
        return values.to(self.dtype).expand(self.shape[0], *values.shape[1:])

    def full(self, values: Tensor) -> Tensor:
        """Values (B, *schedule.shape) for every component."""
        return expand_to(values, torch.empty(self.shape, device="meta")).expand(self.shape)

    def stretch(self, log_snr: Tensor) -> Tensor:
        """x_t = stretch y, (B, *shape)."""
        return torch.hypot(*scales_of(self.full(log_snr), self.schedule.scaling))

    def estimate(self, y: Tensor, log_snr: Tensor) -> Tensor:
        out = self.denoise(y * self.stretch(log_snr), log_snr)
        if out.shape != self.shape:
            raise ValueError(f"denoise: must return the shape of x = {tuple(self.shape)}, got {tuple(out.shape)}")
        return out

    def solve(self, y: Tensor, tolerance: float, method: str) -> tuple[Tensor, Tensor]:
        """y at t = 1 and the integral (B,) of the divergence."""
        from torchdiffeq import odeint

        state = (y, y.new_zeros(y.shape[0]))
        for begin, end in self._pieces():
            if torch.equal(self.log_snr(begin), self.log_snr(end)):
                continue  # nothing moves
            times = torch.tensor([begin, end], dtype=torch.float64, device=self.device)
            path: Any = odeint(self._rate(begin, end), state, times, rtol=tolerance, atol=tolerance, method=method)
            state = (path[0][-1], path[1][-1])
        return state

    def _pieces(self) -> list[tuple[float, float]]:
        ends = [0.0]
        for kink in self.schedule.breakpoints().tolist():
            if ends[-1] + _SHORTEST_PIECE < kink < 1 - _SHORTEST_PIECE:
                ends.append(kink)
        return list(zip(ends, [*ends[1:], 1.0]))

    def _rate(self, begin: float, end: float) -> Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        margin = _INSIDE * (end - begin)

        def rate(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            time = t.double().clamp(begin + margin, end - margin)
            if self.callback is not None:
                self.callback(float(time))
            log_snr, slope = self.log_snr(time), self.full(self._at(self.schedule.log_snr_slope, time))
            square = torch.sigmoid(self.full(log_snr))
            signal = square.sqrt()
            with torch.enable_grad():
                y = state[0].detach().requires_grad_(True)
                x0 = self.estimate(y, log_snr)
                trace = self._weighted_trace(x0, y, slope * signal)
            velocity = 0.5 * slope * (signal * x0.detach() - square * y.detach())
            return velocity, 0.5 * (trace - (slope * square).flatten(1).sum(1))

        return rate

    def _weighted_trace(self, x0: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """sum_i weight_i d x0_i / d y_i (B,), or its estimate."""
        total = y.new_zeros(y.shape[0])
        if not x0.requires_grad:
            return total  # an estimate that does not depend on y
        last = self.probes.shape[0] - 1
        for i, z in enumerate(self.probes):
            product = torch.autograd.grad(x0, y, (weight * z).expand(y.shape), retain_graph=i < last)[0]
            total += (product * z).flatten(1).sum(1)
        return total * self.probe_weight


def _data_end(flow: _Flow, components: Tensor, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """y at t = 0, and the term (B,) that makes log p(y_0) the density of the components.

    "smoothed": the density of c + noise / signal eps at c is that of y at s c, times ds c / dc = s for each component.
    """
    log_snr = flow.log_snr(0.0)
    level = flow.full(log_snr)
    s = torch.sigmoid(level).sqrt()
    term = s.log().flatten(1).sum(1)
    if kind == "smoothed":
        return s * components, term
    eps = torch.randn(components.shape, generator=generator, dtype=components.dtype).to(components.device)
    y = s * components + torch.sigmoid(-level).sqrt() * eps
    error = (components - flow.estimate(y, log_snr)).square() * level.exp()
    return y, term + 0.5 * (eps.square() - error).flatten(1).sum(1)


def _prior_term(flow: _Flow, y: Tensor, prior: Prior) -> Tensor:
    """log N(y; s mean, s covariance s + 1 - s^2), (B,)."""
    level = flow.full(flow.log_snr(1.0))[0].flatten()
    signal, noise_variance = torch.sigmoid(level).sqrt(), torch.sigmoid(-level)
    mean = torch.as_tensor(prior.mean, dtype=y.dtype, device=y.device).expand(y.shape[1:]).flatten()
    offset = y.flatten(1) - signal * mean
    if prior.covariance is not None:
        scaled = prior.covariance.to(y) * signal[:, None] * signal
        factor = torch.linalg.cholesky(scaled + noise_variance.diag())
        white = torch.linalg.solve_triangular(factor, offset.T, upper=False).T
        return -0.5 * (white.square() + math.log(2 * math.pi)).sum(1) - factor.diagonal().log().sum()
    variance = torch.as_tensor(prior.variance, dtype=y.dtype, device=y.device).expand(y.shape[1:]).flatten()
    if not (variance >= 0).all():
        raise ValueError(f"prior.variance: must be >= 0, got {variance.min().item()}")
    spread = signal.square() * variance + noise_variance
    return -0.5 * (offset.square() / spread + (2 * math.pi * spread).log()).sum(1)
