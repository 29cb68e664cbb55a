"""The steps of the solvers by themselves: both ways to tell a level, the way to a noise of 0, and tokens that rest."""

from __future__ import annotations

import functools

import pytest
import torch
from sae_diffusion.diffusion.schedules import SCALINGS
from sae_diffusion.diffusion.steps import CORRECTED, STEPS, At, Churn, Level, Sigma, trapezoid

X, X0, X0_AHEAD, X0_BEFORE, NORMALS = torch.randn(
    5, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
)
SIGMA = torch.tensor([[8.0, 2.0, 0.5, 0.1]], dtype=torch.float64)
NEXT = torch.tensor([[5.0, 1.5, 0.3, 0.05]], dtype=torch.float64)
BEFORE = torch.tensor([[9.0, 2.0, 0.6, 0.2]], dtype=torch.float64)  # the second token rested


def by_log_snr(sigma: torch.Tensor, scaling: str = "ve") -> Level:
    return Level(-2 * sigma.log(), scaling)


def step(solver: str, level, x=X, **options) -> torch.Tensor:
    """A step of x from SIGMA to NEXT, all tokens at once, levels told by `level`."""
    now, then, before = level(SIGMA), level(NEXT), level(BEFORE)
    take = functools.partial(STEPS[solver], **options)
    new = take(At(x, now, X0), then, At(x, before, X0_BEFORE), lambda: NORMALS)
    return trapezoid(At(x, now, X0), At(new, then, X0_AHEAD)) if solver in CORRECTED else new


@pytest.mark.parametrize("solver", STEPS)
def test_sigma_is_the_level_of_the_exploding_scaling(solver):
    torch.testing.assert_close(step(solver, Sigma), step(solver, by_log_snr), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [solver for solver in STEPS if solver not in ("ddpm", *CORRECTED)])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_steps_are_the_same_process_in_every_scaling(solver, scaling):
    """x / signal is the exploding process. Heun's means are of other things in each scaling; ddpm is exact for "vp"."""
    level = functools.partial(by_log_snr, scaling=scaling)
    signal, then = (level(sigma).signal[..., None] for sigma in (SIGMA, NEXT))
    torch.testing.assert_close(step(solver, level, signal * X) / then, step(solver, Sigma), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("solver", [solver for solver in STEPS if solver != "ddpm"])
def test_a_step_to_no_noise_gives_the_estimate(solver):
    end = Sigma(torch.zeros_like(SIGMA))
    new = STEPS[solver](At(X, Sigma(SIGMA), X0), end, At(X, Sigma(BEFORE), X0_BEFORE), lambda: NORMALS)
    torch.testing.assert_close(new, X0, rtol=1e-14, atol=1e-14)


def test_history_counts_for_tokens_that_moved():
    """A token that rested takes the first-order step."""
    now, then = Sigma(SIGMA), Sigma(NEXT)
    without = STEPS["dpm++2m"](At(X, now, X0), then, None, lambda: NORMALS)
    same = (step("dpm++2m", Sigma) == without).flatten(2).all(2).all(0)
    assert same.tolist() == [False, True, False, False]
    ratio = (NEXT / SIGMA)[..., None]
    torch.testing.assert_close(without, ratio * X + (1 - ratio) * X0)


def test_extrapolation_is_limited_where_the_last_step_was_short():
    """h / (2 h_last) is 1/2 for equal steps, 2 where the last one was a quarter of this one, and no more than that."""
    now, then = Sigma(torch.ones(1, 4, dtype=torch.float64)), Sigma(torch.full((1, 4), 2.0**-4, dtype=torch.float64))
    before = Sigma(torch.tensor([[2.0**4, 2.0**2, 2.0, 2.0**0.1]], dtype=torch.float64))
    new = STEPS["dpm++2m"](At(X, now, X0), then, At(X, before, X0_BEFORE), lambda: NORMALS)
    ahead = torch.tensor([0.5, 1.0, 2.0, 2.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(new, X / 16 + 15 / 16 * (X0 + ahead * (X0 - X0_BEFORE)))


@pytest.mark.parametrize("level", [Sigma, by_log_snr, functools.partial(by_log_snr, scaling="vp")])
def test_churn_raises_sigma_within_its_limits(level):
    now = level(SIGMA)
    x, raised = Churn(0.4, least=0.3, greatest=4.0, factor=1.5).add(X, now, 2, lambda: NORMALS)
    ratio = (raised.noise / raised.signal / SIGMA)[0]
    torch.testing.assert_close(ratio, torch.tensor([1.0, 1.2, 1.2, 1.0], dtype=torch.float64))
    added = x / raised.signal[..., None] - X / now.signal[..., None]
    spread = 1.5 * (SIGMA * (ratio.square() - 1).clamp(min=0).sqrt())[..., None]
    torch.testing.assert_close(added, spread * NORMALS)
    still, same = Churn(0.4).add(X, now, 2, lambda: NORMALS, moves=torch.zeros(1, 4, dtype=torch.bool))
    assert torch.equal(still, X) and torch.equal(same.noise, now.noise)
