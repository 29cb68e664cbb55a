"""Every equation of Unified Diffusion, each in the test named after it, against independent numerics.

alpha(t) is the share of signal of a token at t, beta = 1 - alpha, s = alpha / beta, and p < t ("vp"). The numerics build the
chain x_0 -> x_p -> x_t as a joint Gaussian from its definition x_p = sqrt(alpha_p) x_0 + sqrt(beta_p) e,
x_t = sqrt(A) x_p + sqrt(1 - A) e', and condition its covariance matrix.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sae_diffusion.diffusion.posterior import (
    fresh_fraction,
    mean_difference,
    posterior,
    posterior_coefficients,
    step_kl,
    step_kl_eps,
    step_kl_eps_small,
    transition,
    x0_difference,
)
from sae_diffusion.diffusion.schedules import (
    Cosine,
    Staggered,
    Together,
    fraction_to_window,
    scales_of,
    window_to_fraction,
)
from sae_diffusion.diffusion.snr import elbo_integrand
from scipy import integrate

LEVELS = [(0.9999, 0.99), (0.95, 0.4), (0.6, 0.59), (0.3, 0.01), (0.999, 0.001)]  # (alpha(p), alpha(t))
levels = pytest.mark.parametrize(("alpha_p", "alpha_t"), LEVELS)


def log_snr(alpha: float) -> torch.Tensor:
    return torch.tensor(math.log(alpha) - math.log1p(-alpha), dtype=torch.float64)


def close(value: torch.Tensor | float, wanted: float, rel: float = 1e-11) -> None:
    assert float(value) == pytest.approx(float(wanted), rel=rel, abs=1e-13)


def conditioned(alpha_p: float, alpha_t: float, x_0: float, x_t: float) -> tuple[float, float]:
    """Mean and variance of x_p given x_t and x_0, from the covariance matrix of (x_p, x_t) given x_0."""
    step = alpha_t / alpha_p
    mean = np.sqrt([alpha_p, step * alpha_p]) * x_0
    var_p = 1 - alpha_p
    cov = np.array([[var_p, np.sqrt(step) * var_p], [np.sqrt(step) * var_p, step * var_p + 1 - step]])
    gain = cov[0, 1] / cov[1, 1]
    return mean[0] + gain * (x_t - mean[1]), cov[0, 0] - gain * cov[1, 0]


def kl_by_quadrature(mean_q: float, mean_p: float, variance: float) -> float:
    def density(x: float, mean: float) -> float:
        return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    spread = 12 * math.sqrt(variance)
    return integrate.quad(
        lambda x: density(x, mean_q) * ((x - mean_p) ** 2 - (x - mean_q) ** 2) / (2 * variance),
        mean_q - spread, mean_q + spread, epsabs=0, epsrel=1e-11,
    )[0]  # fmt: skip


@levels
def test_alpha_p_t(alpha_p, alpha_t):
    """alpha(p, t) = alpha(t) / alpha(p)."""
    close(transition(log_snr(alpha_p), log_snr(alpha_t))[0] ** 2, alpha_t / alpha_p)


@levels
def test_beta_p_t(alpha_p, alpha_t):
    """beta(p, t) = 1 - alpha(p, t)."""
    close(transition(log_snr(alpha_p), log_snr(alpha_t))[1], 1 - alpha_t / alpha_p)


@pytest.mark.parametrize("alpha", [1e-4, 0.3, 0.5, 0.9999])
def test_s(alpha):
    """s(t) = alpha(t) / beta(t), and log_snr is its logarithm."""
    signal, noise = scales_of(log_snr(alpha), "vp")
    close(signal**2, alpha)
    close(noise**2, 1 - alpha, rel=1e-9)
    close((signal / noise) ** 2, log_snr(alpha).exp())


@levels
@pytest.mark.parametrize("scaling", ["vp", "ve", "flow"])
def test_q_of_x_t_given_x_p(alpha_p, alpha_t, scaling):
    """q(x(t) | x(p)) = N(sqrt(alpha(p, t)) x(p), beta(p, t)) leads from the marginal at p to the marginal at t."""
    factor, variance = transition(log_snr(alpha_p), log_snr(alpha_t), scaling)
    (signal_p, noise_p), (signal_t, noise_t) = (scales_of(log_snr(a), scaling) for a in (alpha_p, alpha_t))
    assert variance > 0
    close(factor * signal_p, signal_t)
    close(factor**2 * noise_p**2 + variance, noise_t**2)


@levels
def test_posterior_mean(alpha_p, alpha_t):
    """mu = beta(p, t) / beta(t) sqrt(alpha(p)) x(0) + beta(p) alpha(p, t) / beta(t) x(t) / sqrt(alpha(p, t)).

    The source's sqrt(alpha(t, p)) in the second term is 1 / sqrt(alpha(p, t)).
    """
    x_0, x_t = torch.tensor(1.3, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    mean, _ = posterior(x_t, x_0, log_snr(alpha_p), log_snr(alpha_t))
    close(mean, conditioned(alpha_p, alpha_t, 1.3, -0.4)[0])
    step, beta_p, beta_t = alpha_t / alpha_p, 1 - alpha_p, 1 - alpha_t
    written = (1 - step) / beta_t * math.sqrt(alpha_p) * 1.3 + beta_p * step / beta_t * math.sqrt(1 / step) * -0.4
    close(mean, written)


@levels
def test_posterior_variance(alpha_p, alpha_t):
    """sigma^2 = alpha(p, t)^-1 (beta(p, t) || beta(p) alpha(p, t)) = beta(p) beta(p, t) / beta(t); || is the harmonic sum."""
    variance = posterior_coefficients(log_snr(alpha_p), log_snr(alpha_t))[2]
    close(variance, conditioned(alpha_p, alpha_t, 1.3, -0.4)[1], rel=1e-9)
    step, beta_p = alpha_t / alpha_p, 1 - alpha_p
    close(variance, 1 / (1 / (1 - step) + 1 / (beta_p * step)) / step)


@levels
@pytest.mark.parametrize("scaling", ["ve", "flow"])
def test_posterior_in_other_scalings(alpha_p, alpha_t, scaling):
    """The chain x_0 -> x_p -> x_t with any signal and noise, conditioned as a joint Gaussian of (x_0, x_p, x_t)."""
    (a_p, s_p), (a_t, s_t) = ([float(v) for v in scales_of(log_snr(a), scaling)] for a in (alpha_p, alpha_t))
    factor = a_t / a_p
    variance_0 = 2.0
    rows = np.array([[1, 0, 0], [a_p, s_p, 0], [a_t, factor * s_p, math.sqrt(s_t**2 - factor**2 * s_p**2)]])
    cov = rows @ np.diag([variance_0, 1, 1]) @ rows.T
    given = [0, 2]
    gain = cov[1, given] @ np.linalg.inv(cov[np.ix_(given, given)])
    mean, variance = posterior(
        torch.tensor(-0.4, dtype=torch.float64),
        torch.tensor(1.3, dtype=torch.float64),
        log_snr(alpha_p),
        log_snr(alpha_t),
        scaling,
    )
    close(mean, gain @ [1.3, -0.4], rel=1e-8)
    close(variance, cov[1, 1] - gain @ cov[given, 1], rel=1e-6)


@levels
def test_p_of_x_p_given_x_t(alpha_p, alpha_t):
    """p(x(p) | x(t)) = q(x(p) | x(t), x0_hat): drawing x(p) so with the true x0 keeps the marginals given x0."""
    of_x_t, of_x_0, variance = posterior_coefficients(log_snr(alpha_p), log_snr(alpha_t))
    signal_t, noise_t = scales_of(log_snr(alpha_t), "vp")
    close(of_x_t * signal_t + of_x_0, math.sqrt(alpha_p))
    close(of_x_t**2 * noise_t**2 + variance, 1 - alpha_p, rel=1e-9)


@levels
def test_delta_mu(alpha_p, alpha_t):
    """Delta mu = beta(p, t) / beta(t) sqrt(alpha(p)) Delta x0, the difference of two posterior means."""
    delta = torch.tensor(0.7, dtype=torch.float64)
    moved = conditioned(alpha_p, alpha_t, 1.3 + 0.7, -0.4)[0] - conditioned(alpha_p, alpha_t, 1.3, -0.4)[0]
    value = mean_difference(delta, log_snr(alpha_p), log_snr(alpha_t))
    close(value, moved, rel=1e-10)
    close(value, (1 - alpha_t / alpha_p) / (1 - alpha_t) * math.sqrt(alpha_p) * 0.7, rel=1e-10)


@pytest.mark.parametrize("scaling", ["vp", "ve", "flow"])
@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.99])
def test_delta_x0(alpha, scaling):
    """Delta x0 = -Delta eps / sqrt(s(t)): two predictions at the same x(t); the source leaves out the minus."""
    signal, noise = scales_of(log_snr(alpha), scaling)
    x, eps, other = 0.8, 0.3, -0.5
    moved = (x - noise * other) / signal - (x - noise * eps) / signal
    close(x0_difference(torch.tensor(other - eps, dtype=torch.float64), log_snr(alpha)), moved)


@levels
def test_kl(alpha_p, alpha_t):
    """KL(q || p) = Delta mu^2 / (2 sigma^2) = beta(p, t) alpha(p) / (2 beta(p) beta(t)) Delta x0^2, against quadrature."""
    delta = 0.3 * math.sqrt((1 - alpha_p) / alpha_p)
    truth, variance = conditioned(alpha_p, alpha_t, 1.3, -0.4)
    guess, _ = conditioned(alpha_p, alpha_t, 1.3 + delta, -0.4)
    value = step_kl(torch.tensor(delta, dtype=torch.float64), log_snr(alpha_p), log_snr(alpha_t))
    close(value, kl_by_quadrature(truth, guess, variance), rel=1e-8)
    step = alpha_t / alpha_p
    close(value, 0.5 * (1 - step) * alpha_p / ((1 - alpha_p) * (1 - alpha_t)) * delta**2, rel=1e-9)


@levels
def test_kl_is_half_the_difference_of_snr(alpha_p, alpha_t):
    """KL(q || p) = (s(p) - s(t)) / 2 Delta x0^2."""
    value = step_kl(torch.tensor(0.7, dtype=torch.float64), log_snr(alpha_p), log_snr(alpha_t))
    close(value, 0.5 * (alpha_p / (1 - alpha_p) - alpha_t / (1 - alpha_t)) * 0.49, rel=1e-9)


@levels
def test_kl_from_delta_eps(alpha_p, alpha_t):
    """KL(q || p) = (s(p) - s(t)) / (2 s(t)) Delta eps^2."""
    delta = torch.tensor(0.7, dtype=torch.float64)
    by_x0 = step_kl(x0_difference(delta, log_snr(alpha_t)), log_snr(alpha_p), log_snr(alpha_t))
    close(step_kl_eps(delta, log_snr(alpha_p), log_snr(alpha_t)), by_x0, rel=1e-10)


def test_kl_of_a_small_step():
    """KL(q || p) ~ (log s(p) - log s(t)) / 2 Delta eps^2: the relative error is half the step in log s."""
    delta, later = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    for step in (1e-2, 1e-3):
        exact, small = (kl(delta, later + step, later) for kl in (step_kl_eps, step_kl_eps_small))
        assert float(exact / small - 1) == pytest.approx(step / 2, rel=0.01)


def steps_of_elbo(schedule: Together, mse, steps: int) -> float:
    """Sum of the KLs of `steps` ancestral steps whose x0_hat is off by sqrt(mse(t))."""
    levels = schedule.log_snr(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    return float(step_kl(mse(levels[1:]).sqrt(), levels[:-1], levels[1:]).sum())


def elbo_by_quadrature(schedule: Together, integrand) -> float:
    corners = schedule.breakpoints().tolist()

    def at(t: float) -> float:
        return float(integrand(torch.tensor([t], dtype=torch.float64)))

    return sum(integrate.quad(at, a, b, epsrel=1e-9, limit=200)[0] for a, b in itertools.pairwise(corners))


CURVED = Together((), Cosine(margin=0.05))


def mse_of_normal_data(log_snr: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + log_snr.exp())


@pytest.mark.parametrize("form", ["x0", "eps", "eps over s"])
def test_elbo(form):
    """L = -1/2 int MSE_x0 s'(t) dt = -1/2 int MSE_eps (log s)' dt = -1/2 int MSE_eps / s s' dt.

    It is the limit of the sum of the KLs of ever shorter steps, hence positive: the source lacks the minus. For N(0, 1)
    data it is ln((1 + s(0)) / (1 + s(1))) / 2.
    """

    def integrand(t: torch.Tensor) -> torch.Tensor:
        level, slope = CURVED.log_snr(t), CURVED.log_snr_slope(t)
        snr, mse_x0 = level.exp(), mse_of_normal_data(level)
        if form == "x0":
            return elbo_integrand(mse_x0.sqrt(), torch.zeros_like(t), CURVED, t, "x0")
        mse_eps = mse_x0 * snr
        if form == "eps":
            return elbo_integrand(mse_eps.sqrt(), torch.zeros_like(t), CURVED, t, "eps")
        return -0.5 * mse_eps / snr * slope * snr

    value = elbo_by_quadrature(CURVED, integrand)
    first, last = CURVED.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)).exp().tolist()
    assert value > 0
    close(value, 0.5 * math.log((1 + first) / (1 + last)), rel=1e-7)
    errors = [abs(steps_of_elbo(CURVED, mse_of_normal_data, steps) - value) for steps in (500, 1000, 2000)]
    assert errors[2] < 0.01 * value
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_bound_where_the_snr_is_large():
    """For L <= s <= R predicting eps = 0 costs ln(R / L) / 2 per component."""
    schedule = Together((), Cosine(margin=0.3))
    value = elbo_by_quadrature(
        schedule, lambda t: elbo_integrand(torch.zeros_like(t), torch.ones_like(t), schedule, t, "eps")
    )
    first, last = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    close(value, 0.5 * (first - last), rel=1e-8)


def test_bound_where_the_snr_is_small():
    """For 0 <= s <= r predicting x0 = 0 costs at most r / 2 per component of unit variance."""
    schedule = Together((), Cosine(margin=0.3))
    value = elbo_by_quadrature(
        schedule, lambda t: elbo_integrand(torch.zeros_like(t), torch.ones_like(t), schedule, t, "x0")
    )
    first, last = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)).exp().tolist()
    close(value, 0.5 * (first - last), rel=1e-8)
    assert value < 0.5 * first


SIZES = [(1, 3.0), (5, 1.0), (20, 8.0), (20, 0.5), (7, 1e6)]
sizes = pytest.mark.parametrize(("tokens", "window"), SIZES)


@sizes
def test_l_of_the_first_token(tokens, window):
    """l(0) = 0, in generation time 1 - t."""
    assert float(Staggered(tokens, window).intervals()[0][0]) == 0


@sizes
def test_r_of_the_last_token(tokens, window):
    """r(N - 1) = 1."""
    assert float(Staggered(tokens, window).intervals()[1][-1]) == pytest.approx(1, abs=1e-15)


@sizes
def test_r_minus_l(tokens, window):
    """r(i) - l(i) = t, the fraction of time in which a token moves, and the schedule does move in it and only in it."""
    schedule = Staggered(tokens, window)
    left, right = schedule.intervals()
    fraction = window_to_fraction(window, tokens)
    torch.testing.assert_close(right - left, torch.full_like(left, fraction), rtol=1e-9, atol=1e-12)
    assert schedule.width == pytest.approx(fraction)
    inside = 0.05 * fraction
    for i in range(tokens):
        edges = 1 - torch.stack([left[i] - inside, left[i] + inside, right[i] - inside, right[i] + inside])
        progress = schedule.progress(edges)[:, i].tolist()
        assert progress[0] == 1
        assert 0 < progress[2] < progress[1] < 1
        assert progress[3] == 0


@sizes
def test_v(tokens, window):
    """v = (N - 1) / (1 - t)."""
    schedule = Staggered(tokens, window)
    assert schedule.speed * (1 - schedule.width) == pytest.approx(tokens - 1, rel=1e-6, abs=1e-9)


@sizes
def test_w(tokens, window):
    """w = v t = t / (1 - t) (N - 1)."""
    schedule = Staggered(tokens, window)
    assert schedule.speed * schedule.width == pytest.approx(window)
    if tokens > 1:
        assert fraction_to_window(schedule.width, tokens) == pytest.approx(window, rel=1e-6)


@sizes
def test_t(tokens, window):
    """t = w / (N - 1 + w)."""
    assert window_to_fraction(window, tokens) == pytest.approx(window / (tokens - 1 + window))
    assert Staggered(tokens, window).width == pytest.approx(window / (tokens - 1 + window))
    assert window_to_fraction(math.inf, tokens) == 1
    assert fraction_to_window(1.0, tokens) == math.inf


@sizes
def test_l_and_r(tokens, window):
    """l(i) = i / v and r(i) = l(i) + t."""
    schedule = Staggered(tokens, window)
    left, right = (edge.tolist() for edge in schedule.intervals())
    for i in range(tokens):
        assert left[i] == pytest.approx(i / (tokens - 1 + window))
        assert right[i] == pytest.approx((i + window) / (tokens - 1 + window))


def test_c_is_beta_p_t_over_beta_t():
    for alpha_p, alpha_t in LEVELS:
        wanted = (1 - alpha_t / alpha_p) / (1 - alpha_t)
        close(fresh_fraction(log_snr(alpha_p), log_snr(alpha_t)), wanted, rel=1e-10)
