"""Which times to draw in training, and the continuous ELBO that losses at these times estimate.

The diffusion term of the negative ELBO of one token is (s = exp(lambda) its SNR, which falls with t)

    L = -1/2 int_0^1 MSE_x0(t) s'(t) dt = -1/2 int_0^1 MSE_eps(t) (log s)'(t) dt.

Where s > 1, predicting eps = 0 already bounds it by a logarithm of s; where s < 1, predicting x0 = 0 by s itself. So s
is drawn logarithmically where it is large and linearly where it is small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sae_kernels import FrameLayout, token_noise

from ..checks import Count, Positive, check_choice, check_value
from .schedules import Schedule, expand_to, scales_of
from .solvers import KINDS, from_x0


class SNRSampler:
    """Times t at which the SNR of the tokens is spread with density proportional to 1 / max(s, join).

    The density is uniform in s below `join`, uniform in log s above, and continuous. With several tokens one of them is
    chosen uniformly, its s is drawn and t follows; so t has the density q(t) = mean_i p_i(s_i(t)) |s_i'(t)|, and the
    weights 1 / q(t) are exact for every token, whichever was chosen.

    Args:
        schedule: any; tokens may have different ranges.
        join: s > 0 at which the density changes from linear to logarithmic.
    """

    def __init__(self, schedule: Schedule, join: float = 1.0) -> None:
        check_value("join", join, Positive)
        self.schedule = schedule
        ends = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
        self.high, self.low = ends[:1].exp(), ends[1:].exp()
        if not bool((self.high > self.low).all()):
            raise ValueError(f"schedule: every token of {type(schedule).__name__} must move between t = 0 and t = 1")
        self.join = torch.as_tensor(join, dtype=torch.float64)
        self._first = self._total(self.low)
        self._mass = self._total(self.high) - self._first

    def draw(
        self, batch: int, generator: torch.Generator | None = None, *, each: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, weight) with E[weight f(t)] = int_0^1 f(t) dt for every f that vanishes where no token moves.

        Stratified: one uniform number of the batch falls into each of `batch` equal intervals.

        Args:
            each: draw a time for every token (diffusion forcing); t and weight are then (B, *shape), else (B,), in
                fp64 on the device of the generator.
        """
        check_value("batch", batch, Count)
        device = generator.device if generator is not None else torch.device("cpu")
        shape = (batch, *self.schedule.shape) if each else (batch,)
        uniform = torch.rand(2, *shape, generator=generator, device=device, dtype=torch.float64)
        uniform = ((uniform[0].argsort(dim=0) + uniform[1]) / batch).to("cpu")
        if each:
            snr = self._inverse(self._first + uniform * self._mass)
            t = self._time_of(snr, None)
        else:
            tokens = self.low.numel()
            token = (uniform * tokens).long().clamp(max=tokens - 1)
            first, mass = self._first.flatten()[token], self._mass.flatten()[token]
            t = self._time_of(self._inverse(first + (uniform * tokens - token) * mass), token)
        return t.to(device), (1 / self.density(t)).to(device)

    def density(self, t: torch.Tensor) -> torch.Tensor:
        """q at t (B,), or of each token's own time for t (B, *shape)."""
        own = self.snr_density(self.schedule.log_snr(t).exp()) * self._speed(t)
        if t.ndim == 1 and self.schedule.shape:
            return own.flatten(1).mean(dim=1)
        return own

    def snr_density(self, snr: torch.Tensor) -> torch.Tensor:
        """p(s) of every token, (B, *shape)."""
        return 1 / (torch.maximum(snr, self.join.to(snr)) * self._mass.to(snr))

    def _speed(self, t: torch.Tensor) -> torch.Tensor:
        return -self.schedule.log_snr_slope(t) * self.schedule.log_snr(t).exp()

    def _total(self, snr: torch.Tensor) -> torch.Tensor:
        """int_0^s ds / max(s, join)."""
        ratio = snr / self.join
        return torch.where(ratio < 1, ratio, 1 + ratio.clamp(min=1).log())

    def _inverse(self, total: torch.Tensor) -> torch.Tensor:
        return self.join * torch.where(total < 1, total, (total.clamp(min=1) - 1).exp())

    def _time_of(self, snr: torch.Tensor, token: torch.Tensor | None) -> torch.Tensor:
        """t with s(t) = snr by bisection: of the chosen token (B,), or of every token (B, *shape)."""
        wanted = snr.log()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(54):
            middle = 0.5 * (low + high)
            value = self.schedule.log_snr(middle)
            if token is not None:
                value = value.reshape(len(middle), -1).gather(1, token[:, None])[:, 0]
            above = value > wanted
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return 0.5 * (low + high)


def elbo_factor(log_snr: torch.Tensor, slope: torch.Tensor, scaling: str, kind: str) -> torch.Tensor:
    """k >= 0 with -1/2 s'(t) Delta x0^2 = k Delta y^2, where y is what a network of this kind predicts.

    x0: -s lambda' / 2; eps: -lambda' / 2; v: -lambda' / 2 (a / (a^2 + s^2))^2; flow: -lambda' / 2 (a / (a + s))^2.
    """
    check_choice("kind", kind, KINDS)
    signal, noise = scales_of(log_snr, scaling)
    if kind == "x0":
        return -0.5 * slope * log_snr.exp()
    if kind == "eps":
        return -0.5 * slope
    return -0.5 * slope * (signal / (signal.square() + noise.square() if kind == "v" else signal + noise)).square()


def elbo_integrand(
    prediction: torch.Tensor, target: torch.Tensor, schedule: Schedule, t: torch.Tensor, kind: str = "x0"
) -> torch.Tensor:
    """Integrand of L at t, nats per token and unit of time, (B, *schedule.shape) in the dtype of `prediction`.

    Squared errors are summed over the dimensions that share a level.

    Args:
        prediction, target: (B, *shape, ...) of the same kind: "x0", "eps", "v" or "flow" (`to_x0`).
        t: (B,) or (B, *shape).
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction: must have the shape of target {tuple(target.shape)}, got {tuple(prediction.shape)}"
        )
    factor = elbo_factor(schedule.log_snr(t), schedule.log_snr_slope(t), schedule.scaling, kind)
    expand_to(factor, prediction)
    error = (prediction - target).square()
    error = error.flatten(factor.ndim).sum(dim=-1) if error.ndim > factor.ndim else error
    shared = [d for d in range(1, factor.ndim) if factor.shape[d] == 1]
    error = error.sum(dim=shared, keepdim=True) if shared else error
    return factor.to(error) * error


def elbo(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x0: torch.Tensor,
    schedule: Schedule,
    t: torch.Tensor,
    weight: torch.Tensor,
    *,
    kind: str = "x0",
    seed: int = 0,
    offset: int = 0,
) -> torch.Tensor:
    """Unbiased estimates of L, nats per token: (B, *schedule.shape); differentiable in the network.

    Sum over tokens for the example's L. Prior and reconstruction terms are not included.

    Args:
        predict: (x_t, log_snr) -> prediction of `kind`.
        x0: (B, *shape, ...) data.
        t, weight: from `SNRSampler.draw`, or any t with weight 1 / density.
        seed, offset: of `sae_kernels.token_noise`.
    """
    log_snr = schedule.log_snr(t)
    work = torch.float64 if x0.dtype == torch.float64 else torch.float32
    signal, noise = (expand_to(s, x0).to(x0.device, work) for s in scales_of(log_snr, schedule.scaling))
    layout = FrameLayout(frames=x0.shape[1], tokens_per_frame=1, noisy_copies=0)
    x, _ = token_noise(x0, signal, noise, layout, seed=seed, offset=offset, return_noise=True)
    prediction = predict(x, log_snr.to(x0.device, work))
    target = from_x0(x0, x, signal, noise, kind)
    integrand = elbo_integrand(prediction, target, schedule, t, kind)
    return integrand * weight.reshape(weight.shape + (1,) * (integrand.ndim - weight.ndim)).to(integrand)
