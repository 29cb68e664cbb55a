"""Solvers against closed forms and against implementations written here from the papers.

Gaussian data x_0 ~ N(m, C) have the exact denoiser x0_hat = m + C A (A C A + S^2)^-1 (x - A m), A and S diagonal with the
tokens' signal and noise. All tokens at one level, its ODE has the flow map x -> m' + M'^(1/2) M^(-1/2) (x - m) between the
marginals N(m, M); other schedules are compared with a fine solution by scipy.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sae_diffusion.diffusion import solvers
from sae_diffusion.diffusion.sampler import SamplerConfig, sigma_schedule
from sae_diffusion.diffusion.schedules import (
    EDM,
    SCALINGS,
    Columns,
    ComponentLinear,
    Cosine,
    Flow,
    Given,
    LogLinear,
    Rolling,
    Schedule,
    Staggered,
    Together,
    Triangular,
    VPLinear,
    expand_to,
    scales_of,
)
from sae_diffusion.diffusion.solvers import (
    KINDS,
    SOLVERS,
    Churn,
    context_guided,
    from_x0,
    guided,
    roll,
    sample,
    start,
    step_normals,
    to_x0,
)
from scipy.integrate import solve_ivp

MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
COV = torch.tensor([[1.2, 0.6, 0.2], [0.6, 0.8, -0.1], [0.2, -0.1, 0.5]], dtype=torch.float64)
STOCHASTIC = ["ancestral", "ddpm", "ddim", "stochastic-heun"]


def gaussian(schedule: Schedule, mean: torch.Tensor = MEAN, cov: torch.Tensor = COV):
    """The exact denoiser of N(mean, cov) for x (B, N)."""

    def denoise(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        signal, noise = scales_of(log_snr[0], schedule.scaling)
        signal, noise = (scale.expand(len(mean)) for scale in (signal, noise))
        gain = cov * signal @ torch.linalg.inv(signal[:, None] * cov * signal + torch.diag(noise**2))
        return mean + (x - signal * mean) @ gain.T

    return denoise


def smooth(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    """A nonlinear network that mixes tokens (B, N, ...) and sees its levels; takes x / signal of "vp"."""
    level = expand_to(log_snr, x)
    return torch.tanh(x + 0.5 * x.roll(1, dims=1) + 0.3 * x.mean(dim=1, keepdim=True)) * torch.sigmoid(0.3 * level + 1)


def noise_like(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orders(errors: list[float]) -> list[float]:
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


# Predictions


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_convert_to_x0_and_back(kind, scaling):
    signal, noise = (s[:, None] for s in scales_of(torch.linspace(-5, 8, 7, dtype=torch.float64), scaling))
    x0, eps = noise_like(7, 4), noise_like(7, 4, seed=1)
    x = signal * x0 + noise * eps
    wanted = {"x0": x0, "eps": eps, "v": signal * eps - noise * x0, "flow": eps - x0}[kind]
    torch.testing.assert_close(from_x0(x0, x, signal, noise, kind), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(to_x0(wanted, x, signal, noise, kind), x0, rtol=1e-9, atol=1e-9)


# Convergence of the deterministic solvers


def flow_map(schedule: Together, x: torch.Tensor) -> torch.Tensor:
    """The exact flow from t = 1 to t = 0 when all tokens share one level."""
    values, basis = torch.linalg.eigh(COV)
    (signal, noise) = schedule.scales(torch.tensor([1.0, 0.0], dtype=torch.float64))
    signal, noise = signal.reshape(2, -1)[:, :1], noise.reshape(2, -1)[:, :1]
    deviation = (signal**2 * values + noise**2).sqrt()
    return signal[1] * MEAN + (x - signal[0] * MEAN) @ basis * (deviation[1] / deviation[0]) @ basis.T


@pytest.mark.parametrize(
    "schedule",
    [
        Together((), LogLinear(6.0, -4.0)), Together((3,), LogLinear(6.0, -4.0), scaling="ve"),
        Together((), LogLinear(6.0, -4.0), scaling="flow"), Together((), Cosine(margin=0.05)),
        Together((), VPLinear(margin=0.01)), Together((), Flow(margin=0.03)), Together((), EDM(0.02, 8.0, 3.0)),
    ],
    ids=lambda s: f"{s.scaling}-{type(s.curve).__name__}",
)  # fmt: skip
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm++2m", 2)])
def test_order_of_convergence_on_gaussian_data(schedule, solver, order):
    denoise, x = gaussian(schedule), start((4, 3), schedule, dtype=torch.float64)
    exact = flow_map(schedule, x)
    errors = [
        float((sample(denoise, x, schedule, schedule.times(n), solver=solver, final="state") - exact).abs().max())
        for n in (100, 200, 400)
    ]
    assert orders(errors)[1] == pytest.approx(order, abs=0.2)
    assert errors[2] < (0.05 if order == 1 else 2e-3)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++2m"])
@pytest.mark.parametrize(
    "schedule",
    [
        Staggered(3, 1.7, LogLinear(5.0, -4.0)), Staggered(3, 1, LogLinear(5.0, -4.0), order=[2, 0, 1]),
        Staggered(3, 2, LogLinear(5.0, -4.0), scaling="flow"), Triangular(3, 4, 1, LogLinear(4.0, -3.0), scaling="ve"),
        ComponentLinear(torch.tensor([1.2, 0.8, 0.5]), 3.0, start=5.0, end=-3.0),
    ],
    ids=["staggered", "autoregressive", "flow", "triangular", "gud"],
)  # fmt: skip
def test_order_of_convergence_on_per_token_schedules(schedule, solver):
    """Correlated tokens at their own levels, the grid not aligned with their windows; reference by scipy."""
    denoise, x = gaussian(schedule), start((2, 3), schedule, dtype=torch.float64)

    def velocity(t: float, flat: np.ndarray, inside: tuple[float, float]) -> np.ndarray:
        """dx = a' x0_hat + s' eps_hat, with a' and s' by the chain rule from the slope of log-SNR."""
        state = torch.from_numpy(flat).reshape(2, 3)
        time = torch.tensor([min(max(t, inside[0] + 1e-12), inside[1] - 1e-12)], dtype=torch.float64)
        level = schedule.log_snr(time).requires_grad_()
        x0 = denoise(state, level.detach().expand(2, -1))
        signal, noise = scales_of(level, schedule.scaling)
        signal_slope, noise_slope = (
            torch.autograd.grad((s + 0 * level).sum(), level)[0] * schedule.log_snr_slope(time) for s in (signal, noise)
        )
        eps = (state - signal * x0) / noise
        return (signal_slope * x0 + noise_slope * eps).detach().numpy().ravel()

    exact = x.numpy().ravel()
    corners = schedule.breakpoints().flip(0).tolist()
    for late, early in itertools.pairwise(corners):
        exact = solve_ivp(
            velocity, (late, early), exact, method="DOP853", rtol=1e-9, atol=1e-10, args=((early, late),)
        ).y[:, -1]
    errors = []
    for n in (101, 202, 404):
        solved = sample(denoise, x, schedule, schedule.times(n), solver=solver, final="state")
        errors.append(float((solved - torch.from_numpy(exact).reshape(2, 3)).abs().max()))
    order = 1 if solver == "euler" else 2
    # Corners fall at changing places of the steps, so single ratios scatter.
    assert math.log2(errors[0] / errors[2]) / 2 == pytest.approx(order, abs=0.45)
    assert errors[2] < (0.03 if order == 1 else 1e-3)


# Moments of the stochastic solvers, exactly: sampling is affine in the start and the normals of every step


def sampled_moments(
    monkeypatch, denoise, schedule: Schedule, steps: int, cov_start: torch.Tensor, mean_start: torch.Tensor, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of what a solver returns at t = 0, by sending unit vectors through it."""
    tokens = len(mean_start)
    unit = torch.eye(tokens, dtype=torch.float64)
    rows = torch.zeros(1 + tokens + steps * tokens, tokens, dtype=torch.float64)
    rows[1 : 1 + tokens] = unit

    def normals(shape, *, seed, offset, device, dtype):
        out = torch.zeros(shape, dtype=dtype)
        first = 1 + tokens + offset * tokens
        out[first : first + tokens] = unit
        return out

    monkeypatch.setattr(solvers, "token_noise_eps", normals)
    out = sample(denoise, rows, schedule, schedule.times(steps), final="state", **options)
    monkeypatch.undo()
    effects = (out[1:] - out[:1]).T
    linear, noise = effects[:, :tokens], effects[:, tokens:]
    return linear @ mean_start + out[0], linear @ cov_start @ linear.T + noise @ noise.T


def marginal(schedule: Schedule, t: float, mean: torch.Tensor, cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    signal, noise = (s[0].expand(len(mean)) for s in schedule.scales(torch.tensor([t], dtype=torch.float64)))
    return signal * mean, signal[:, None] * cov * signal + torch.diag(noise**2)


PER_TOKEN = [
    Staggered(3, 2, LogLinear(5.0, -3.0)), Staggered(3, 1.3, LogLinear(5.0, -3.0), scaling="flow"),
    Together((3,), EDM(0.05, 6.0, 3.0)), ComponentLinear(torch.tensor([1.0, 0.5, 0.2]), 2.0, start=5.0),
    Triangular(3, 4, 1, LogLinear(5.0, -3.0), scaling="ve"),
]  # fmt: skip


@pytest.mark.parametrize("schedule", PER_TOKEN, ids=lambda s: f"{type(s).__name__}-{s.scaling}")
@pytest.mark.parametrize(("solver", "eta"), [("ancestral", 0), ("ddim", 1.0), ("ddim", 0.4)])
def test_ancestral_and_ddim_are_exact_for_data_at_one_point(monkeypatch, schedule, solver, eta):
    point, none = MEAN, torch.zeros(3, 3, dtype=torch.float64)
    mean_start, cov_start = marginal(schedule, 1.0, point, none)
    mean, cov = sampled_moments(
        monkeypatch, lambda x, level: point.expand_as(x), schedule, 5, cov_start, mean_start, solver=solver, eta=eta
    )
    wanted = marginal(schedule, 0.0, point, none)
    torch.testing.assert_close(mean, wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cov, wanted[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", PER_TOKEN, ids=lambda s: f"{type(s).__name__}-{s.scaling}")
def test_ddpm_is_exact_for_unit_normal_data(monkeypatch, schedule):
    mean, unit = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    start_mean, start_cov = marginal(schedule, 1.0, mean, unit)
    denoise = gaussian(schedule, mean, unit)
    _, cov = sampled_moments(monkeypatch, denoise, schedule, 5, start_cov, start_mean, solver="ddpm")
    torch.testing.assert_close(cov, marginal(schedule, 0.0, mean, unit)[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", PER_TOKEN, ids=lambda s: f"{type(s).__name__}-{s.scaling}")
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_moments_of_gaussian_data_converge_with_the_steps(monkeypatch, schedule, solver):
    denoise = gaussian(schedule)
    mean_start, cov_start = marginal(schedule, 1.0, MEAN, COV)
    mean_end, cov_end = marginal(schedule, 0.0, MEAN, COV)
    errors = []
    for steps in (24, 48, 96):
        mean, cov = sampled_moments(
            monkeypatch, denoise, schedule, steps, cov_start, mean_start, solver=solver, eta=0.5, churn=Churn(4.0)
        )
        errors.append(float(torch.cat([(cov - cov_end).flatten(), mean - mean_end]).abs().max()))
    assert errors[2] < 0.1
    assert math.log2(errors[0] / errors[2]) / 2 > 0.8


def test_drawn_samples_have_the_moments_of_the_data():
    """End to end with the real generator, 20 000 samples, within five standard errors of a 64-step solution."""
    schedule, batch = Staggered(3, 2, LogLinear(7.0, -6.0)), 20_000
    x = start((batch, 3), schedule, seed=1, dtype=torch.float64)
    out = sample(gaussian(schedule), x, schedule, schedule.times(96), solver="stochastic-heun", seed=2, final="state")
    mean, cov = marginal(schedule, 0.0, MEAN, COV)
    error = (cov.diagonal() / batch).sqrt()
    assert ((out.mean(dim=0) - mean).abs() < 5 * error).all()
    spread = ((cov**2 + cov.diagonal()[:, None] * cov.diagonal()) / batch).sqrt()
    assert ((out.T.cov() - cov).abs() < 5 * spread + 0.01).all()


# Solvers against each other and against the papers


@pytest.mark.parametrize("scaling", SCALINGS)
def test_ddim_with_eta_1_is_ancestral(scaling):
    schedule = Staggered(4, 2.5, Cosine(), scaling=scaling)
    x = start((3, 4, 2), schedule, dtype=torch.float64)
    ancestral, ddim = (
        sample(smooth, x, schedule, schedule.times(11), solver=solver, eta=1.0, seed=5)
        for solver in ("ancestral", "ddim")
    )
    torch.testing.assert_close(ddim, ancestral, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ddim, sample(smooth, x, schedule, schedule.times(11), solver="ddim", eta=0.9, seed=5))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_as_published(eta):
    """Song et al. 2021, eqs. 12 and 16, in their alpha (the share of signal) and eps."""
    schedule = Together((), Cosine())
    x = start((3, 4), schedule, dtype=torch.float64)
    times = schedule.times(9)
    got = sample(smooth, x, schedule, times, solver="ddim", eta=eta, seed=6, final="state")
    alpha = torch.sigmoid(schedule.log_snr(times))
    for i in range(9):
        now, after = alpha[i], alpha[i + 1]
        x0 = smooth(x, schedule.log_snr(times[i : i + 1]).expand(3))
        eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
        sigma = eta * ((1 - after) / (1 - now)).sqrt() * (1 - now / after).sqrt()
        x = after.sqrt() * x0 + (1 - after - sigma**2).sqrt() * eps + sigma * step_normals(x, 6, i)
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_euler_is_ddim_with_eta_0(scaling):
    schedule = Staggered(4, 2.5, Cosine(), scaling=scaling)
    x = start((3, 4, 2), schedule, dtype=torch.float64)
    euler, ddim = (sample(smooth, x, schedule, schedule.times(11), solver=solver) for solver in ("euler", "ddim"))
    torch.testing.assert_close(ddim, euler, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaling", ["ve", "flow"])
@pytest.mark.parametrize("solver", ["ancestral", "ddpm", "ddim", "euler", "dpm++2m"])
def test_other_scalings_give_the_same_sample(solver, scaling):
    """A network that looks at x / signal cannot tell the scalings apart, and neither can these solvers."""
    samples = []
    for name in ("vp", scaling):
        schedule = Staggered(4, 2.5, LogLinear(), scaling=name)

        def denoise(x: torch.Tensor, log_snr: torch.Tensor, name: str = name) -> torch.Tensor:
            vp, own = scales_of(log_snr, "vp")[0], scales_of(log_snr, name)[0]
            return smooth(expand_to(vp / own, x) * x, log_snr)

        x = start((3, 4, 2), schedule, dtype=torch.float64)
        samples.append(sample(denoise, x, schedule, schedule.times(9), solver=solver, eta=0.3, seed=4))
    torch.testing.assert_close(samples[0], samples[1], rtol=1e-9, atol=1e-9)


def edm_reference(denoise, x: torch.Tensor, sigma: list[float], churn: Churn, seed: int) -> torch.Tensor:
    """EDM algorithm 2 (1 without churn) on levels that end above 0, then the last Euler step to 0."""
    steps = len(sigma) - 1
    for i, (now, after) in enumerate(itertools.pairwise(sigma)):
        gamma = min(churn.amount / steps, math.sqrt(2) - 1) if churn.least <= now <= churn.greatest else 0.0
        raised = now * (1 + gamma)
        x = x + math.sqrt(raised**2 - now**2) * churn.factor * step_normals(x, seed, i)
        slope = (x - denoise(x, raised)) / raised
        ahead = x + (after - raised) * slope
        x = x + (after - raised) * 0.5 * (slope + (ahead - denoise(ahead, after)) / after)
    return denoise(x, sigma[-1])


@pytest.mark.parametrize(
    "churn", [Churn(0.0), Churn(5.0), Churn(40.0, 0.1, 3.0, 1.01)], ids=["none", "some", "limited"]
)
def test_heun_with_the_edm_curve_is_edm(churn):
    levels = sigma_schedule(SamplerConfig(sampling_steps=10, sigma_min=0.02, sigma_max=20.0))[:-1].tolist()
    schedule = Together((), EDM(0.02, 20.0))
    x = start((3, 4), schedule, dtype=torch.float64)

    def net(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        return smooth(x / (1 + (-log_snr).exp()[:, None]).sqrt(), log_snr)

    def by_sigma(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return net(x, torch.full((3,), -2 * math.log(sigma), dtype=torch.float64))

    wanted = edm_reference(by_sigma, x, levels, churn, seed=3)
    solver = "stochastic-heun" if churn.amount else "heun"
    got = sample(net, x, schedule, schedule.times(9), solver=solver, churn=churn, seed=3)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_churn_is_spread_over_the_steps_in_which_a_token_moves():
    """Autoregressive: every token is churned as if it were alone."""
    schedule = Staggered(3, 1, LogLinear(5.0, -4.0), scaling="ve")
    alone = Together((1,), LogLinear(5.0, -4.0), scaling="ve")

    def denoise(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * torch.sigmoid(log_snr)

    x = start((2, 3), schedule, dtype=torch.float64)
    options = {"solver": "stochastic-heun", "churn": Churn(1.2), "final": "state"}
    together = sample(denoise, x, schedule, schedule.times(12), seed=1, **options)
    for token in range(3):
        normals = [step_normals(x, 1, 4 * token + i)[:, token : token + 1] for i in range(4)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(solvers, "step_normals", lambda x, seed, step, normals=normals: normals[step])
            single = sample(denoise, x[:, token : token + 1], alone, alone.times(4), **options)
        torch.testing.assert_close(together[:, token : token + 1], single, rtol=1e-9, atol=1e-9)


def test_heun_with_the_flow_curve_is_heun_on_the_velocity():
    schedule = Together((), Flow())
    x = start((3, 4), schedule, dtype=torch.float64)
    got = sample(smooth, x, schedule, schedule.times(10), solver="heun", final="state")

    def velocity(x: torch.Tensor, u: float) -> torch.Tensor:
        u = min(max(u, 1e-3), 1 - 1e-3)  # the curve's margin
        x0 = smooth(x, torch.full((3,), 2 * math.log((1 - u) / u), dtype=torch.float64))
        return (x - x0) / u

    times = schedule.times(10).clamp(1e-3, 1 - 1e-3).tolist()
    for now, after in itertools.pairwise(times):
        slope = velocity(x, now)
        x = x + (after - now) * 0.5 * (slope + velocity(x + (after - now) * slope, after))
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "curve", [Cosine(margin=0.05), VPLinear(margin=0.05), EDM(0.02, 20.0)], ids=lambda c: type(c).__name__
)
def test_dpm_solver_2m_as_published(curve):
    """Lu et al. 2022b, algorithm 2, in their alpha, sigma and lambda = ln(alpha / sigma)."""
    schedule = Together((), curve)
    x = start((3, 4), schedule, dtype=torch.float64)
    times = schedule.times(12)
    got = sample(smooth, x, schedule, times, solver="dpm++2m", final="state")
    alpha, sigma = schedule.scales(times)
    lam = alpha.log() - sigma.log()
    last, h_last = None, None
    for i in range(12):
        h = lam[i + 1] - lam[i]
        x0 = smooth(x, (2 * lam[i]).expand(3))
        guess = x0 if i == 0 else (1 + h / (2 * h_last)) * x0 - h / (2 * h_last) * last
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * guess
        last, h_last = x0, h
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


def test_dpm_solver_starts_every_token_with_a_first_order_step():
    schedule = Staggered(3, 1, LogLinear(5.0, -4.0))
    x = start((2, 3), schedule, dtype=torch.float64)
    times = schedule.times(12)
    states = {}
    sample(smooth, x, schedule, times, solver="dpm++2m", callback=lambda i, x, x0: states.update({i: x}))
    for first in (4, 8):
        euler = sample(smooth, states[first - 1], schedule, times[first : first + 2], solver="euler", final="state")
        torch.testing.assert_close(states[first], euler, rtol=1e-10, atol=1e-10)
        second = sample(smooth, states[first], schedule, times[first + 1 : first + 3], solver="euler", final="state")
        assert not torch.allclose(states[first + 1], second)


def test_dpm_solver_stays_bounded_when_a_window_begins_just_before_a_grid_point():
    """The history of such a token is 1e-7 of a step; extrapolating from it would blow up."""
    schedule = Staggered(2, 1, LogLinear(5.0, -4.0))
    grid = torch.tensor([1.0, 0.75, 0.5 - 1e-8, 0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    x = start((4, 2), schedule, dtype=torch.float64)
    sizes = []
    sample(smooth, x, schedule, grid, solver="dpm++2m", callback=lambda i, x, x0: sizes.append(float(x.abs().max())))
    assert max(sizes) < 5


# The ends of the family


def autoregressive(denoise, x: torch.Tensor, steps: int, curve: LogLinear, seed: int) -> torch.Tensor:
    """Token after token with the ancestral sampler: 1-D diffusion of a token given the finished and the untouched ones."""
    x = x.clone()
    tokens = x.shape[1]
    snr = [math.exp(curve.start + (1 - i / steps) * (curve.end - curve.start)) for i in range(steps + 1)]
    alpha = [s / (1 + s) for s in snr]
    for token in range(tokens):
        for i in range(steps):
            later, earlier = alpha[i], alpha[i + 1]
            log_snr = torch.tensor([curve.start] * token + [math.log(snr[i])] + [curve.end] * (tokens - token - 1))
            x0 = denoise(x, log_snr.double().expand(len(x), -1))[:, token]
            step = later / earlier
            mean = (1 - step) / (1 - later) * math.sqrt(earlier) * x0
            mean = mean + (1 - earlier) * math.sqrt(step) / (1 - later) * x[:, token]
            variance = (1 - earlier) * (1 - step) / (1 - later)
            x[:, token] = mean + math.sqrt(variance) * step_normals(x, seed, token * steps + i)[:, token]
    return x


def test_window_1_equals_an_autoregressive_sampler():
    tokens, steps, curve = 5, 4, LogLinear(8.0, -4.0)
    schedule = Staggered(tokens, 1, curve)
    x = start((3, tokens, 2), schedule, dtype=torch.float64)
    levels_seen = []

    def denoise(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        levels_seen.append(log_snr)
        # fp32 levels of the reference below differ by rounding only
        return smooth(x, log_snr)

    got = sample(denoise, x, schedule, schedule.times(tokens * steps), solver="ancestral", seed=7, final="state")
    assert all(((level == 8.0) | (level == -4.0)).sum(dim=1).min() >= tokens - 1 for level in levels_seen)
    wanted = autoregressive(smooth, x, steps, curve, seed=7)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_window_inf_equals_joint_diffusion(solver):
    tokens = 5
    joint, levels = Together((), Cosine()), Staggered(tokens, math.inf, Cosine())
    x = start((3, tokens, 2), joint, dtype=torch.float64)

    def one_level(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        return smooth(x, log_snr[:, None].expand(-1, tokens))

    times = joint.times(8)
    wanted = sample(one_level, x, joint, times, solver=solver, seed=2, eta=0.5)
    assert torch.equal(sample(smooth, x, levels, times, solver=solver, seed=2, eta=0.5), wanted)
    wide = sample(smooth, x, Staggered(tokens, 1e9, Cosine()), times, solver=solver, seed=2, eta=0.5)
    torch.testing.assert_close(wide, wanted, rtol=1e-4, atol=1e-4)


def test_every_token_may_have_its_own_times():
    """Times (steps + 1, N) that are those of the staggered windows give the staggered sample."""
    staggered, plain = Staggered(4, 2, LogLinear()), Together((4,), LogLinear())
    x = start((3, 4), plain, dtype=torch.float64)
    times = staggered.times(10)
    wanted = sample(smooth, x, staggered, times, seed=1)
    torch.testing.assert_close(sample(smooth, x, plain, staggered.progress(times), seed=1), wanted)


# Bits, ends, dtypes


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tokens_that_do_not_change_keep_their_bits(solver, dtype):
    schedule = Staggered(4, 1.5, LogLinear())
    times = schedule.times(18)
    levels = schedule.log_snr(times)
    x = start((3, 4, 2), schedule, dtype=dtype)
    states = [x]
    sample(
        smooth, x, schedule, times, solver=solver, eta=0.5, callback=lambda i, x, x0: states.append(x), final="state"
    )
    assert len(states) == 19
    resting = 0
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        assert after.dtype == dtype
        for token in range(4):
            same = torch.equal(before[:, token], after[:, token])
            assert same == bool(levels[i, token] == levels[i + 1, token])
            resting += same
    assert resting > 10


def test_given_tokens_keep_their_bits_to_the_end():
    known = torch.tensor([True, True, False, False])
    schedule = Given(Staggered(4, 1, LogLinear()), known)
    x = start((2, 4, 3), schedule)
    seen = []

    def denoise(x, log_snr):
        seen.append(log_snr)
        return smooth(x, log_snr)

    out = sample(denoise, x, schedule, schedule.times(8))
    assert torch.equal(out[:, known], x[:, known])
    assert (out[:, ~known] != x[:, ~known]).all()
    assert all((level[:, known] == torch.tensor(9.2)).all() for level in seen)


def test_final():
    schedule = Together((3,), LogLinear())
    x = start((2, 3), schedule, dtype=torch.float64)
    state = sample(smooth, x, schedule, schedule.times(6), final="state")
    data = sample(smooth, x, schedule, schedule.times(6))
    assert torch.equal(data, sample(smooth, x, schedule, schedule.times(6), final="data"))
    torch.testing.assert_close(data, smooth(state, torch.full((2, 3), 9.2, dtype=torch.float64)))
    part = schedule.times(6)[:4]
    assert torch.equal(sample(smooth, x, schedule, part), sample(smooth, x, schedule, part, final="state"))
    whole = sample(smooth, sample(smooth, x, schedule, part, seed=3), schedule, schedule.times(6)[3:], seed=3, offset=3)
    assert torch.equal(whole, sample(smooth, x, schedule, schedule.times(6), seed=3))


def test_noise_is_a_function_of_seed_and_step():
    schedule = Staggered(3, 2)
    x = start((2, 3), schedule)
    runs = [sample(smooth, x, schedule, schedule.times(6), seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    assert not torch.equal(step_normals(x, 1, 0), step_normals(x, 1, 1))
    assert torch.equal(start((2, 3), schedule, seed=4), start((2, 3), schedule, seed=4))
    assert not torch.equal(start((2, 3), schedule, seed=4), start((2, 3), schedule, seed=5))


@pytest.mark.parametrize("curve", [EDM(), LogLinear(), Flow()], ids=lambda c: type(c).__name__)
def test_start_has_the_marginal_of_unit_data(curve):
    schedule = Together((4,), curve)
    x = start((5000, 4), schedule, dtype=torch.float64)
    signal, noise = schedule.scales(torch.ones(1, dtype=torch.float64))
    deviation = float((signal**2 + noise**2).sqrt()[0, 0])
    assert float(x.std()) == pytest.approx(deviation, rel=5 / math.sqrt(2 * 20_000))


def test_half_precision_networks_are_told_levels_in_fp32():
    schedule = Together((3,), LogLinear())
    seen = []

    def denoise(x, log_snr):
        seen.append(log_snr.dtype)
        return x

    sample(denoise, start((2, 3), schedule, dtype=torch.bfloat16), schedule, schedule.times(2))
    assert set(seen) == {torch.float32}


def test_images_with_levels_per_pixel_broadcast_over_channels():
    schedule = Columns((1, 4, 4), 0.5, Cosine())
    x = start((2, 3, 4, 4), schedule, dtype=torch.float64)
    colours = sample(
        lambda x, level: torch.tanh(x) * torch.sigmoid(level), x, schedule, schedule.times(6), solver="heun"
    )
    for c in range(3):
        one = sample(
            lambda x, level: torch.tanh(x) * torch.sigmoid(level),
            x[:, c : c + 1],
            schedule,
            schedule.times(6),
            solver="heun",
        )
        assert torch.equal(colours[:, c : c + 1], one)


# Guidance


def test_guidance_in_x0_is_guidance_of_the_score():
    schedule = Together((), LogLinear())
    strong, weak = gaussian(schedule), gaussian(schedule, torch.zeros(3).double(), torch.eye(3).double())
    x, level = noise_like(5, 3), torch.full((5,), 0.7, dtype=torch.float64)
    signal, noise = (s[:, None] for s in scales_of(level, "vp"))
    eps = [from_x0(net(x, level), x, signal, noise, "eps") for net in (strong, weak)]
    wanted = to_x0(eps[1] + 2.5 * (eps[0] - eps[1]), x, signal, noise, "eps")
    torch.testing.assert_close(guided(strong, weak, 2.5)(x, level), wanted)
    assert guided(strong, weak, 1) is strong
    assert guided(strong, weak, 0) is weak


def test_context_guidance_hides_clean_tokens_and_guides_only_the_others():
    inner = Staggered(4, 1, LogLinear())
    schedule = Given(inner, torch.tensor([True, True, False, False]))
    level = schedule.log_snr(torch.tensor([0.3, 0.3]))
    x = noise_like(2, 4, 3).float()
    calls = []

    def net(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        calls.append((x, log_snr))
        return smooth(x, log_snr)

    guide = context_guided(net, schedule, 3.0, seed=1)
    out = guide(x, level)
    (strong_x, strong_level), (weak_x, weak_level) = calls
    assert torch.equal(strong_x, x)
    assert torch.equal(strong_level, level)
    assert torch.equal(weak_x[:, 2:], x[:, 2:])
    assert torch.equal(weak_level[:, 2:], level[:, 2:])
    assert (weak_level[:, :2] == -4.6).all()
    assert (weak_x[:, :2] != x[:, :2]).all()
    strong, weak = smooth(x, level), smooth(weak_x, weak_level)
    torch.testing.assert_close(out[:, 2:], (weak + 3 * (strong - weak))[:, 2:])
    assert torch.equal(out[:, :2], strong[:, :2])
    assert torch.equal(context_guided(net, schedule, 1.0)(x, level), strong)
    noisy = inner.log_snr(torch.tensor([1.0, 1.0]))
    calls.clear()
    guide(x, noisy)
    assert len(calls) == 1  # no context, nothing to hide
    with_threshold = context_guided(net, schedule, 3.0, threshold=-10.0)
    assert torch.equal(with_threshold(x, level), strong)  # all tokens count as context


# Rolling


def test_roll_yields_the_levels_of_global_time_and_every_token_once():
    window, per_token = 4, 3
    schedule = Rolling(window, LogLinear())
    levels, calls_at = [], []

    def denoise(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        levels.append(log_snr[0])
        return smooth(x, log_snr)

    tokens = []
    for token in itertools.islice(roll(denoise, schedule, (2, window, 3), per_token, seed=1, dtype=torch.float64), 5):
        tokens.append(token)
        calls_at.append(len(levels))
    assert [t.shape for t in tokens] == [(2, 3)] * 5
    assert calls_at == [window * per_token + 1 + i * (per_token + 1) for i in range(5)]
    curve = LogLinear()
    for call in range(window * per_token):  # the run-in: global time grows by 1 / per_token a step
        there = schedule.progress_at(torch.tensor(call / per_token, dtype=torch.float64), torch.arange(window))
        torch.testing.assert_close(levels[call], curve(there))
    for shift in range(1, 5):
        for i in range(per_token):
            glob = torch.tensor(window + shift - 1 + i / per_token, dtype=torch.float64)
            there = schedule.progress_at(glob, shift + torch.arange(window))
            torch.testing.assert_close(levels[calls_at[shift - 1] + i], curve(there))
    again = list(itertools.islice(roll(smooth, schedule, (2, window, 3), per_token, seed=1, dtype=torch.float64), 5))
    assert all(torch.equal(a, b) for a, b in zip(tokens, again))
    assert len({tuple(t.flatten().tolist()) for t in tokens}) == 5


def test_roll_keeps_the_order_of_its_window():
    """The deterministic solver moves every token on its own, so a token comes out as a function of its entry noise."""
    schedule = Rolling(3, LogLinear())
    states = []

    def denoise(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        states.append(x)
        return 0.9 * x

    list(itertools.islice(roll(denoise, schedule, (2, 3), 1, solver="euler", dtype=torch.float64), 2))
    leaving, entered = states[3], states[4]  # the window at t = 0 of the run-in, and at t = 1 of the first shift
    assert torch.equal(entered[:, :2], leaving[:, 1:])


def test_roll_of_independent_tokens_has_the_moments_of_the_data():
    """Unit normal tokens: "ddpm" is exact, so 2000 x 6 tokens have mean 0 and variance 1 and do not correlate."""
    schedule = Rolling(3, LogLinear(9.0, -9.0))

    def denoise(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        return scales_of(log_snr, "vp")[0] * x

    drawn = itertools.islice(roll(denoise, schedule, (2000, 3), 2, solver="ddpm", dtype=torch.float64), 6)
    tokens = torch.stack(list(drawn), dim=1)
    error = 5 / math.sqrt(2000)
    assert tokens.mean(dim=0).abs().max() < error
    assert (tokens.T.cov() - torch.eye(6)).abs().max() < error * math.sqrt(2)


# Refusals


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"solver": "rk4"}, ValueError, "solver: must be one of ancestral, ddpm"),
        ({"eta": 2.0}, ValueError, r"eta: must be in \[0, 1\], got 2.0"),
        ({"final": "clean"}, ValueError, "final: must be one of auto, state, data, got 'clean'"),
        ({"x_start": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "x_start: must be a float tensor"),
        ({"x_start": torch.zeros(2, 4)}, ValueError, r"x: must have shape .* got \(2, 4\)"),
        ({"times": torch.linspace(0, 1, 5)}, ValueError, "times: must not increase"),
        ({"times": torch.ones(3, 2)}, ValueError, r"times: must have shape \(steps \+ 1,\)"),
        ({"denoise": lambda x, level: x[:, :1]}, ValueError, r"denoise: must return the shape of x = \(2, 3\)"),
    ],
)
def test_sample_refuses_by_name(change, error, message):
    call = {
        "denoise": smooth, "x_start": torch.zeros(2, 3), "schedule": Staggered(3, 1), "times": torch.linspace(1, 0, 5)
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        sample(**call)


def test_sample_refuses_a_schedule_that_rises_or_is_not_finite():
    class Rising(Together):
        def log_snr(self, t):
            return -super().log_snr(t)

    class Infinite(Together):
        def log_snr(self, t):
            return super().log_snr(t) / t[:, None]

    for broken, message in ((Rising((3,)), "Rising must not increase"), (Infinite((3,)), "Infinite must be finite")):
        with pytest.raises(ValueError, match=message):
            sample(smooth, torch.zeros(2, 3), broken, torch.linspace(1, 0, 5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Churn(-1.0), "amount: must be at least 0"),
        (lambda: Churn(1.0, 2.0, 1.0), "greatest: must be >= least"),
        (lambda: guided(smooth, smooth, math.nan), "weight: must be finite"),
        (lambda: to_x0(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1), "score"), "kind: must be one of"),
        (lambda: next(roll(smooth, Staggered(3, 1), (2, 3), 1)), "schedule: must be a Rolling"),
        (lambda: next(roll(smooth, Rolling(3), (2, 4), 1)), r"shape: must be \(B, W = 3, ...\), got \(2, 4\)"),
    ],
)
def test_helpers_refuse_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
