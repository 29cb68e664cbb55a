"""SNR sampling and the continuous ELBO: exact weights, three equal forms, closed forms for Gaussian data.

For x_0 ~ N(m, C) and any per-token schedule the diffusion term is ln det(I + C D(0)) / 2 - ln det(I + C D(1)) / 2 with
D(t) = diag(SNR): the integral does not depend on the path (I-MMSE).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sae_diffusion.diffusion.schedules import (
    EDM,
    SCALINGS,
    Columns,
    ComponentLinear,
    Cosine,
    Flow,
    Given,
    Independent,
    LogLinear,
    Schedule,
    Staggered,
    Together,
    scales_of,
)
from sae_diffusion.diffusion.snr import SNRSampler, elbo, elbo_factor, elbo_integrand
from sae_diffusion.diffusion.solvers import KINDS, from_x0

COV = torch.tensor([[1.2, 0.6, 0.2], [0.6, 0.8, -0.1], [0.2, -0.1, 0.5]], dtype=torch.float64)
SCHEDULES = {
    "together": Together((3,), Cosine()),
    "scalar": Together((), LogLinear()),
    "staggered": Staggered(3, 1.5, LogLinear()),
    "autoregressive": Staggered(3, 1, Cosine()),
    "edm": Staggered(3, 2, EDM(0.02, 20.0)),
    "flow": Together((3,), Flow()),
    "gud": ComponentLinear(torch.tensor([1.0, 0.3, 0.1]), 3.0),
    "gud-clipped": ComponentLinear(torch.tensor([1.0, 0.3, 0.1]), 3.0, clip=(-4.0, 5.0)),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integral(function, a: float, b: float) -> torch.Tensor:
    """Gauss-Legendre over [a, b]; function (B,) -> (B, ...)."""
    node, weight = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(400))
    values = function(a + (b - a) * 0.5 * (node + 1))
    return (values * (0.5 * (b - a) * weight).reshape(-1, *(1,) * (values.ndim - 1))).sum(dim=0)


def quadrature(schedule: Schedule, function) -> torch.Tensor:
    """Integral over t from 0 to 1, piece by piece between the schedule's breakpoints."""
    return sum(integral(function, a, b) for a, b in itertools.pairwise(schedule.breakpoints().tolist()))


def mmse(schedule: Schedule, t: torch.Tensor) -> torch.Tensor:
    """Per token E (x_0 - E[x_0 | x_t])^2 for N(0, C), (B, N)."""
    precision = torch.linalg.inv(COV) + torch.diag_embed(schedule.log_snr(t).exp().reshape(len(t), -1).expand(-1, 3))
    return torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1)


def analytic_integrand(schedule: Schedule, t: torch.Tensor) -> torch.Tensor:
    """-s' MMSE / 2 per token, written out, (B, N)."""
    slope = (schedule.log_snr_slope(t) * schedule.log_snr(t).exp()).reshape(len(t), -1)
    return -0.5 * slope * mmse(schedule, t)


def information(schedule: Schedule, t: float) -> float:
    snr = schedule.log_snr(torch.tensor([t], dtype=torch.float64)).exp().reshape(-1).expand(3)
    return 0.5 * float(torch.linalg.slogdet(torch.eye(3, dtype=torch.float64) + COV * snr)[1])


def optimal(schedule: Schedule, kind: str = "x0"):
    """The exact network for N(0, C), predicting `kind`."""

    def predict(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        signal, noise = scales_of(log_snr.reshape(len(x), -1).expand(-1, 3), schedule.scaling)
        gram = signal[:, :, None] * COV * signal[:, None, :] + torch.diag_embed(noise**2)
        x0 = (COV * signal[:, None, :] @ torch.linalg.solve(gram, x[:, :, None]))[:, :, 0]
        return from_x0(x0, x, signal, noise, kind)

    return predict


def gaussian_data(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, generator=random(seed), dtype=torch.float64) @ torch.linalg.cholesky(COV).T


# The density


@every_schedule
@pytest.mark.parametrize("join", [0.3, 1.0, 20.0])
def test_density_over_snr_is_linear_then_logarithmic_continuous_and_normalised(schedule, join):
    sampler = SNRSampler(schedule, join)
    low, high = sampler.low[0], sampler.high[0]
    below, above = (torch.tensor(join, dtype=torch.float64) * (1 + sign * 1e-9) for sign in (-1, 1))
    shape = (1, *schedule.shape)
    torch.testing.assert_close(sampler.snr_density(below.expand(shape)), sampler.snr_density(above.expand(shape)))
    flat = [sampler.snr_density((low * 1.0 + f * (min(join, low.min() * 9) - low))[None]) for f in (0.1, 0.4)]
    torch.testing.assert_close(*flat)
    logarithmic = [sampler.snr_density(s.expand(shape)) * s for s in (above * 1.1, above * 5)]
    torch.testing.assert_close(*logarithmic)
    log_s = (
        low.log() + (high.log() - low.log()) * torch.linspace(0, 1, 20_001).double().reshape(-1, *(1,) * low.ndim)
    ).exp()
    mass = torch.trapezoid(sampler.snr_density(log_s) * log_s, log_s.log(), dim=0)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-5, atol=0)


@pytest.mark.parametrize("join", [1e-9, 1e9])
def test_join_outside_the_range_is_purely_logarithmic_or_linear(join):
    sampler = SNRSampler(Together((), LogLinear()), join)
    t, _ = sampler.draw(4000, random())
    s = sampler.schedule.log_snr(t).exp().sort().values
    low, high = float(sampler.low), float(sampler.high)
    if join < 1:
        s, low, high = s.log(), math.log(low), math.log(high)
    rank = ((s - low) / (high - low) * 4000).floor().clamp(max=3999)
    assert (rank.long() - torch.arange(4000)).abs().max() <= 1


@every_schedule
def test_density_over_time_is_the_one_drawn_from_and_normalised(schedule):
    sampler = SNRSampler(schedule)
    total = quadrature(schedule, sampler.density)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=3e-5, atol=0)  # the density has a corner at s = join
    t, weight = sampler.draw(20_000, random())
    assert t.shape == weight.shape == (20_000,)
    torch.testing.assert_close(weight, 1 / sampler.density(t))
    for edge in (0.2, 0.5, 0.9):
        inside = sum(
            float(integral(sampler.density, a, min(b, edge)))
            for a, b in itertools.pairwise(schedule.breakpoints().tolist())
            if a < edge
        )
        assert float((t < edge).double().mean()) == pytest.approx(inside, abs=5 * 0.5 / math.sqrt(20_000))


def test_draws_are_stratified_over_snr():
    """A batch has exactly one draw in each of its equal parts of probability."""
    sampler = SNRSampler(Together((), LogLinear()), join=2.0)
    t, _ = sampler.draw(64, random())
    s = sampler.schedule.log_snr(t).exp()
    total = torch.where(s < 2.0, s / 2.0, 1 + (s / 2.0).log())
    first = math.exp(-4.6) / 2
    probability = (total - first) / (1 + math.log(math.exp(9.2) / 2) - first)
    assert torch.equal((probability * 64).floor().long().sort().values, torch.arange(64))
    assert not torch.equal(t, t.sort().values)


def test_draws_are_stratified_over_tokens_too():
    schedule = Staggered(4, 1, LogLinear())
    t, _ = SNRSampler(schedule).draw(40, random())
    moving = (schedule.log_snr_slope(t) < 0).double().argmax(dim=1)
    assert moving.bincount().tolist() == [10, 10, 10, 10]


def test_every_token_may_draw_its_own_time():
    schedule = Independent((3, 2), Cosine())
    sampler = SNRSampler(schedule)
    t, weight = sampler.draw(32, random(), each=True)
    assert t.shape == weight.shape == (32, 3, 2)
    torch.testing.assert_close(weight, 1 / sampler.density(t))
    alone = SNRSampler(Together((), Cosine()))
    torch.testing.assert_close(sampler.density(t), alone.density(t.flatten()).reshape(t.shape))
    assert len({tuple(order) for order in t.flatten(1).argsort(dim=0).T.tolist()}) == 6


# Unbiasedness, closed forms


@every_schedule
def test_integral_of_the_analytic_mse_has_the_closed_form(schedule):
    total = float(quadrature(schedule, lambda t: analytic_integrand(schedule, t)).sum())
    assert total == pytest.approx(information(schedule, 0.0) - information(schedule, 1.0), rel=1e-7)


@every_schedule
@pytest.mark.parametrize("join", [0.5, 30.0])
def test_importance_weighted_estimate_is_unbiased_per_token(schedule, join):
    """The mean over 80 small batches equals the quadrature of an analytic MSE within five standard errors."""
    exact = quadrature(schedule, lambda t: analytic_integrand(schedule, t))
    sampler, generator = SNRSampler(schedule, join), random(1)
    estimates = []
    for _ in range(80):
        t, weight = sampler.draw(16, generator)
        estimates.append((weight[:, None] * analytic_integrand(schedule, t)).mean(dim=0))
    estimates = torch.stack(estimates)
    error = estimates.std(dim=0) / math.sqrt(80)
    assert ((estimates.mean(dim=0) - exact).abs() < 5 * error + 1e-12).all()
    assert (error < 0.1 * exact).all()


def test_snr_sampling_has_less_variance_than_uniform_times():
    schedule = Together((3,), EDM(0.002, 80.0))
    sampler = SNRSampler(schedule)
    t, weight = sampler.draw(4096, random())
    by_snr = (weight[:, None] * analytic_integrand(schedule, t)).sum(dim=1)
    uniform = analytic_integrand(schedule, torch.rand(4096, generator=random(), dtype=torch.float64)).sum(dim=1)
    assert by_snr.std() < 0.5 * uniform.std()


@every_schedule
def test_elbo_of_gaussian_data_with_the_exact_network(schedule):
    """The whole estimator, with noised data: mean over 20 000 examples against the closed form."""
    x0 = gaussian_data(20_000)
    t, weight = SNRSampler(schedule).draw(len(x0), random(3))
    terms = elbo(optimal(schedule), x0, schedule, t, weight, seed=5)
    assert terms.shape == (20_000, *schedule.shape)
    total = terms.reshape(len(x0), -1).sum(dim=1)
    wanted = information(schedule, 0.0) - information(schedule, 1.0)
    assert wanted > 0
    assert float(total.mean()) == pytest.approx(wanted, abs=5 * float(total.std()) / math.sqrt(len(x0)))


def test_elbo_with_independent_times_is_the_sum_over_tokens_for_independent_data():
    """Diffusion forcing: tokens that do not depend on each other have ln((1 + s(0)) / (1 + s(1))) / 2 each."""
    schedule = Independent((4,), LogLinear())
    x0 = torch.randn(20_000, 4, generator=random(), dtype=torch.float64)
    t, weight = SNRSampler(schedule).draw(len(x0), random(1), each=True)

    def predict(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        return scales_of(log_snr, "vp")[0] * x

    terms = elbo(predict, x0, schedule, t, weight)
    wanted = 0.5 * (math.log1p(math.exp(9.2)) - math.log1p(math.exp(-4.6)))
    error = terms.std(dim=0) / math.sqrt(len(x0))
    assert ((terms.mean(dim=0) - wanted).abs() < 5 * error).all()


# Forms


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
def test_the_forms_agree_on_the_same_draws(schedule, kind):
    """To fp64 rounding: where s is large, x0 and x_t / signal cancel to a relative 1e-16 s."""
    x0 = gaussian_data(256)
    t, weight = SNRSampler(schedule).draw(256, random(2))

    def network(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * torch.sigmoid(log_snr.reshape(256, -1))

    def predict(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        signal, noise = (s.reshape(256, -1) for s in scales_of(log_snr, schedule.scaling))
        return from_x0(network(x, log_snr), x, signal, noise, kind)

    by_x0 = elbo(network, x0, schedule, t, weight, seed=4)
    torch.testing.assert_close(elbo(predict, x0, schedule, t, weight, kind=kind, seed=4), by_x0, rtol=1e-10, atol=1e-11)
    assert (by_x0 >= 0).all()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_factor_of_each_form(scaling, kind):
    """From Delta x0 at fixed x_t, by differentiating the conversion."""
    log_snr = torch.linspace(-6, 9, 16, dtype=torch.float64)
    slope = -torch.linspace(1, 20, 16, dtype=torch.float64)
    signal, noise = scales_of(log_snr, scaling)
    x0 = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    (change,) = torch.autograd.grad(from_x0(x0, torch.full_like(log_snr, 0.7), signal, noise, kind).sum(), x0)
    wanted = -0.5 * slope * log_snr.exp() / change**2
    torch.testing.assert_close(elbo_factor(log_snr, slope, scaling, kind), wanted, rtol=1e-10, atol=0)


def test_integrand_sums_over_dimensions_that_share_a_level():
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    prediction, target = (torch.randn(2, 3, 4, 5, generator=random(s), dtype=torch.float64) for s in (0, 1))
    error = (prediction - target).square()
    for schedule, wanted in (
        (Together((), LogLinear()), error.flatten(1).sum(dim=1)),
        (Together((3,), LogLinear()), error.sum(dim=(2, 3))),
        (Columns((1, 4, 5), 0.0), error.sum(dim=1, keepdim=True)),
        (Columns((3, 4, 5), 0.0), error),
    ):
        factor = elbo_factor(schedule.log_snr(t), schedule.log_snr_slope(t), "vp", "eps")
        assert torch.equal(elbo_integrand(prediction, target, schedule, t, "eps"), factor * wanted)


def test_elbo_is_differentiable_and_keeps_the_dtype():
    schedule = Staggered(3, 2)
    scale = torch.tensor(0.5, requires_grad=True)
    x0 = gaussian_data(8).float()
    t, weight = SNRSampler(schedule).draw(8, random())
    terms = elbo(lambda x, level: scale * x, x0, schedule, t, weight, kind="eps")
    assert terms.dtype == torch.float32
    terms.sum().backward()
    assert scale.grad.isfinite()
    assert scale.grad != 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SNRSampler(Together(), 0.0), "join: must be positive, got 0.0"),
        (lambda: SNRSampler(Given(Staggered(2, 1), torch.tensor([True, False]))), "every token of Given must move"),
        (lambda: SNRSampler(Together()).draw(0), "batch: must be at least 1, got 0"),
        (lambda: elbo_factor(torch.zeros(1), torch.zeros(1), "vp", "score"), "kind: must be one of x0, eps, v, flow"),
        (
            lambda: elbo_integrand(torch.zeros(2, 3), torch.zeros(2, 1), Staggered(3, 1), torch.zeros(2)),
            r"prediction: must have the shape of target \(2, 1\), got \(2, 3\)",
        ),
    ],
)
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
