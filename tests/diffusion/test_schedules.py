"""Schedules: their published formulas, the direction of generation, slopes, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_diffusion.diffusion.sampler import SamplerConfig, sigma_schedule
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
    PerPixel,
    Rolling,
    Rows,
    Schedule,
    Staggered,
    Together,
    Triangular,
    VPLinear,
    check_schedule,
    expand_to,
    fraction_to_window,
    sampling_times,
    scales_of,
)

CURVES = [LogLinear(), VPLinear(), Cosine(), EDM(), Flow(), EDM(0.1, 2.0, 1.0), VPLinear(beta_min=0.0), Cosine(s=0.0)]
VARIANCES = torch.tensor([4.0, 1.0, 0.2, 0.05], dtype=torch.float64)
SCHEDULES = {
    **{f"together-{type(curve).__name__}-{i}": Together((3,), curve) for i, curve in enumerate(CURVES)},
    "together-scalar": Together(),
    "independent": Independent((2, 3), Cosine()),
    "autoregressive": Staggered(4, 1),
    "staggered": Staggered(5, 2.5, VPLinear()),
    "staggered-order": Staggered(5, 3, order=[2, 0, 4, 1, 3]),
    "gaps": Staggered(4, 0.25),
    "joint": Staggered(4, math.inf, Flow()),
    "one-token": Staggered(1, 1),
    "triangular": Triangular(4, 6, 2),
    "triangular-joint": Triangular(4, 6, 0),
    "rolling": Rolling(4, Cosine()),
    "run-in": Rolling(4, first=True),
    "components": ComponentLinear(VARIANCES, 2.0),
    "components-clipped": ComponentLinear(VARIANCES, 3.0, clip=(-4.0, 5.0)),
    "columns": Columns((1, 2, 4), 0.6),
    "rows": Rows((3, 4, 2), 0.3, EDM()),
    "per-pixel": PerPixel(torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.5),
    "given": Given(Staggered(4, 2), torch.tensor([True, False, False, True])),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def grid(points: int) -> torch.Tensor:
    return torch.linspace(0, 1, points, dtype=torch.float64)


# What holds for all of them


@every_schedule
def test_every_schedule_passes_the_check_and_falls_from_data_to_noise(schedule):
    check_schedule(schedule)
    values = schedule.log_snr(grid(201))
    assert values.shape == (201, *schedule.shape)
    assert values.isfinite().all()
    assert (values[1:] <= values[:-1] + 1e-12).all()


@every_schedule
def test_slope_is_the_derivative(schedule):
    """By autograd and by central differences, at random times away from the corners."""
    corners = schedule.breakpoints()
    generator = torch.Generator().manual_seed(1)
    t = torch.rand(64, generator=generator, dtype=torch.float64)
    t = t[(t[:, None] - corners).abs().amin(dim=1) > 1e-5].requires_grad_()
    values, slope = schedule.log_snr(t), schedule.log_snr_slope(t)
    step = 1e-6
    differences = (schedule.log_snr(t.detach() + step) - schedule.log_snr(t.detach() - step)) / (2 * step)
    torch.testing.assert_close(slope.detach(), differences, rtol=1e-6, atol=1e-6)
    for token in range(math.prod(schedule.shape)):
        if not values.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(values.reshape(len(t), -1)[:, token].sum(), t, retain_graph=True)
        torch.testing.assert_close(slope.detach().reshape(len(t), -1)[:, token], gradient, rtol=1e-9, atol=1e-9)
    assert (slope <= 0).all()


@every_schedule
def test_between_breakpoints_the_slope_integrates_to_log_snr(schedule):
    nodes, weights = torch.tensor([-(0.6**0.5), 0.0, 0.6**0.5]).double(), torch.tensor([5.0, 8.0, 5.0]).double() / 18
    for a, b in zip(schedule.breakpoints(), schedule.breakpoints()[1:]):
        inner = a + (b - a) * 0.5 * (1 - torch.cos(math.pi * grid(129)))
        centre, half = 0.5 * (inner[1:] + inner[:-1]), 0.5 * (inner[1:] - inner[:-1])
        total = sum(
            (weight * 2 * half).reshape(-1, *(1,) * len(schedule.shape)) * schedule.log_snr_slope(centre + node * half)
            for node, weight in zip(nodes, weights)
        ).sum(dim=0)
        rise = schedule.log_snr(b[None])[0] - schedule.log_snr(a[None])[0]
        torch.testing.assert_close(total, rise, rtol=2e-3, atol=1e-6)


@every_schedule
def test_examples_do_not_depend_on_their_batch_and_tokens_may_have_their_own_time(schedule):
    t = torch.rand(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for method in (schedule.log_snr, schedule.log_snr_slope):
        together = method(t)
        for i in range(7):
            assert torch.equal(together[i : i + 1], method(t[i : i + 1]))
        own = torch.rand(7, *schedule.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        values = method(own).reshape(7, -1)
        for token in range(values.shape[1]):
            alone = method(own.reshape(7, -1)[:, token].contiguous()).reshape(7, -1)
            assert torch.equal(values[:, token], alone[:, token])


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_time(schedule, dtype):
    t = torch.tensor([0.0, 0.3, 1.0], dtype=dtype)
    for value in (schedule.log_snr(t), schedule.log_snr_slope(t), *schedule.scales(t)):
        assert value.dtype == dtype
        assert value.isfinite().all()
    torch.testing.assert_close(schedule.log_snr(t).double(), schedule.log_snr(t.double()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scales_have_the_log_snr_and_the_law_of_their_scaling(scaling):
    log_snr = torch.linspace(-30, 30, 121, dtype=torch.float64)
    signal, noise = scales_of(log_snr, scaling)
    torch.testing.assert_close(2 * (signal / noise).log(), log_snr, rtol=1e-10, atol=1e-10)
    law = {"vp": signal**2 + noise**2, "ve": signal, "flow": signal + noise}[scaling]
    torch.testing.assert_close(law, torch.ones_like(law), rtol=1e-12, atol=0)


def test_scaling_defaults_to_that_of_the_curve():
    assert [Together((), curve).scaling for curve in (LogLinear(), VPLinear(), Cosine(), EDM(), Flow())] == [
        "vp", "vp", "vp", "ve", "flow"
    ]  # fmt: skip
    assert Together((), Flow(), scaling="ve").scaling == "ve"


# Curves against the formulas they are published with


def test_edm_grid_is_the_one_of_the_video_sampler():
    config = SamplerConfig(sampling_steps=9, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    _, sigma = Together((), EDM(0.01, 50.0, 5.0)).scales(sampling_times(Together(), 8))
    torch.testing.assert_close(sigma, sigma_schedule(config)[:-1], rtol=1e-12, atol=0)


def test_curves_take_their_published_numbers_by_position():
    assert VPLinear(0.2, 10.0) == VPLinear(beta_min=0.2, beta_max=10.0)
    assert Cosine(0.01) == Cosine(s=0.01)
    assert EDM(0.1, 2.0, 3.0) == EDM(sigma_min=0.1, sigma_max=2.0, rho=3.0)


def test_vp_linear():
    u = grid(33)[1:]
    signal, noise = scales_of(VPLinear()(u), "vp")
    variance = torch.exp(-(0.1 * u + 0.5 * 19.9 * u**2))
    torch.testing.assert_close(signal**2, variance, rtol=1e-10, atol=0)
    torch.testing.assert_close(noise**2, 1 - variance, rtol=1e-10, atol=0)


def test_cosine():
    def share(u: torch.Tensor) -> torch.Tensor:
        return torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    u = grid(33)[1:-1]
    variance = share(u) / share(torch.zeros(()).double())
    signal, noise = scales_of(Cosine()(u), "vp")
    torch.testing.assert_close(signal**2, variance, rtol=1e-10, atol=0)
    torch.testing.assert_close(noise**2, 1 - variance, rtol=1e-10, atol=0)


def test_flow_matching_is_the_straight_line():
    u = grid(33)[1:-1]
    signal, noise = Together((), Flow()).scales(u)
    torch.testing.assert_close(signal, 1 - u, rtol=1e-12, atol=0)
    torch.testing.assert_close(noise, u, rtol=1e-12, atol=0)


@pytest.mark.parametrize("curve", CURVES, ids=lambda c: type(c).__name__)
def test_curves_are_clipped_to_finite_ends_with_slope_zero_beyond_their_corners(curve):
    u = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert curve(u).isfinite().all()
    for corner in curve.corners:
        beyond = torch.tensor([corner / 2 if corner < 0.5 else (corner + 1) / 2], dtype=torch.float64)
        assert curve.slope(beyond) == 0
        assert curve(beyond) == curve(torch.tensor([corner], dtype=torch.float64))


# Staggered windows, pipelines, rolling


def first_generated(schedule: Schedule) -> list[int]:
    """Tokens in the order in which they become clean while t falls from 1 to 0, found by looking."""
    times = grid(2001).flip(0)
    values = schedule.log_snr(times).flatten(1)
    cleaned = (values > values.amax() - 0.5 * (values.amax() - values.amin())).int().argmax(dim=0)
    return cleaned.argsort(stable=True).tolist()


def test_token_0_is_generated_first():
    assert first_generated(Staggered(5, 2)) == [0, 1, 2, 3, 4]
    assert first_generated(Triangular(5, 4, 2)) == [0, 1, 2, 3, 4]
    for rolling in (Rolling(5), Rolling(5, first=True)):
        assert rolling.log_snr(torch.tensor([0.1]))[0].argsort(descending=True).tolist() == [0, 1, 2, 3, 4]
    assert first_generated(Columns((1, 1, 5), 0.8)) == [0, 1, 2, 3, 4]
    assert first_generated(Rows((1, 5, 1), 0.8)) == [0, 1, 2, 3, 4]


def test_columns_and_rows_vary_along_their_own_axis():
    half = torch.tensor([0.5], dtype=torch.float64)
    columns, rows = Columns((2, 3, 4), 0.7).log_snr(half)[0], Rows((2, 3, 4), 0.7).log_snr(half)[0]
    assert torch.equal(columns, columns[:1, :1].expand(2, 3, 4))
    assert torch.equal(rows, rows[:1, :, :1].expand(2, 3, 4))
    assert (columns[0, 0, 1:] < columns[0, 0, :-1]).any()
    assert (rows[0, 1:, 0] < rows[0, :-1, 0]).any()


@given(st.permutations(list(range(6))), st.floats(0.3, 12))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_order_is_the_order_of_generation(order, window):
    assert first_generated(Staggered(6, window, order=order)) == order
    natural, permuted = (Staggered(6, window, order=o).log_snr(grid(50)) for o in (None, order))
    assert torch.equal(permuted[:, order], natural)


def test_window_1_moves_one_token_at_a_time_and_each_between_its_own_grid_points():
    tokens, steps = 7, 3
    schedule = Staggered(tokens, 1)
    levels = schedule.log_snr(schedule.times(tokens * steps))
    moves = levels[1:] != levels[:-1]
    assert torch.equal(moves, torch.eye(tokens, dtype=torch.bool).repeat_interleave(steps, dim=0))


def test_wide_windows_become_joint():
    t = grid(31)
    joint = Together((5,)).log_snr(t)
    assert torch.equal(Staggered(5, math.inf).log_snr(t), joint)
    previous = math.inf
    for window in (10.0, 100.0, 1000.0):
        gap = float((Staggered(5, window).log_snr(t) - joint).abs().max())
        assert gap < previous / 5
        previous = gap


def test_triangular_is_the_pyramid_matrix():
    assert Triangular(4, 3, 2).levels().tolist() == [
        [3, 3, 3, 3], [2, 3, 3, 3], [1, 3, 3, 3], [0, 2, 3, 3], [0, 1, 3, 3],
        [0, 0, 2, 3], [0, 0, 1, 3], [0, 0, 0, 2], [0, 0, 0, 1], [0, 0, 0, 0],
    ]  # fmt: skip
    for schedule in (
        Triangular(4, 3, 2),
        Triangular(5, 4, 1, order=[3, 1, 4, 0, 2]),
        Triangular(3, 2, 5),
        Triangular(3, 4, 0),
    ):
        times = schedule.times()
        assert len(times) == schedule.macro_steps + 1
        torch.testing.assert_close(
            schedule.progress(times), schedule.levels().double() / schedule.steps_per_token, rtol=0, atol=1e-12
        )


def test_rolling_hands_every_slot_to_the_one_before_it():
    schedule = Rolling(5, Cosine())
    done, begin = schedule.progress(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(done[1:], begin[:-1])
    assert done[0] == 0
    assert begin[-1] == 1
    run_in = Rolling(5, Cosine(), first=True)
    ready, noise = run_in.progress(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert (noise == 1).all()
    torch.testing.assert_close(ready, done)


def test_rolling_in_global_time_enters_as_noise_and_leaves_after_the_window():
    window = 4
    schedule, run_in = Rolling(window), Rolling(window, first=True)
    token = torch.arange(100)
    for k in (0, 17, 99):
        at = schedule.progress_at(torch.tensor([k - 1.0, k, k + 2.0, k + 4.0, k + 9.0]).double(), token[k])
        assert at.tolist() == [1, 1, 0.5, 0, 0]
    for t in grid(9).tolist():
        local = torch.tensor([t], dtype=torch.float64)
        first_slot = 20
        glob = first_slot + window - t  # slot 0 is clean at t = 0
        there = schedule.progress_at(torch.tensor(glob, dtype=torch.float64), first_slot + torch.arange(window))
        torch.testing.assert_close(schedule.progress(local)[0], there)
        start = schedule.progress_at(torch.tensor(window * (1 - t), dtype=torch.float64), torch.arange(window))
        torch.testing.assert_close(run_in.progress(local)[0], start)


def test_independent_times_are_uniform_and_stratified_token_by_token():
    schedule = Independent((3, 2))
    t = schedule.draw(50, torch.Generator().manual_seed(0))
    assert t.shape == (50, 3, 2)
    assert torch.equal((t * 50).floor().long().sort(dim=0).values, torch.arange(50)[:, None, None].expand(50, 3, 2))
    ranks = t.reshape(50, 6).argsort(dim=0).T
    assert len({tuple(row) for row in ranks.tolist()}) == 6
    torch.testing.assert_close(schedule.log_snr(t), LogLinear()(t))


# GUD


def test_gud_hardness_1_is_standard_diffusion():
    values = ComponentLinear(VARIANCES, 1.0).log_snr(grid(11))
    torch.testing.assert_close(values, values[:, :1].expand_as(values), rtol=1e-12, atol=1e-12)


def test_gud_hardness_0_gives_every_component_the_same_snr():
    values = ComponentLinear(VARIANCES, 0.0).log_snr(grid(11)) + VARIANCES.log()
    torch.testing.assert_close(values, values[:, :1].expand_as(values), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values[:, 0], 7.0 - 10.0 * grid(11))


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0, 4.0])
def test_gud_equations_13_and_20(a):
    """In the paper's gamma = -lambda, with gamma_denoise = -7 and gamma_noise = 3, for an ordering of our own."""
    ordering = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    schedule = ComponentLinear(VARIANCES, a, ordering)
    gamma_min = -7 + VARIANCES.log() + a * (ordering - 2.0)
    gamma_max = gamma_min + 3 + 7 + a * (2.0 - -1.0)
    t = grid(5)
    torch.testing.assert_close(-schedule.log_snr(t), gamma_min + t[:, None] * (gamma_max - gamma_min))
    snr = schedule.log_snr(torch.tensor([0.0, 1.0]).double()) + VARIANCES.log()
    assert float(snr[0, 2]) == pytest.approx(7.0)  # the greatest l ends at start
    assert float(snr[1, 1]) == pytest.approx(-3.0)  # the least l ends at end


def test_gud_components_of_large_variance_are_generated_first():
    shuffled = torch.tensor([0.2, 4.0, 0.05, 1.0], dtype=torch.float64)
    schedule = ComponentLinear(shuffled, 5.0)
    snr = schedule.log_snr(torch.tensor([0.5]).double())[0] + shuffled.log()
    assert snr.argsort(descending=True).tolist() == [1, 3, 0, 2]


def test_gud_clip():
    free, clipped = (ComponentLinear(VARIANCES, 3.0, clip=clip) for clip in (None, (-4.0, 5.0)))
    t = grid(41)
    assert torch.equal(clipped.log_snr(t), free.log_snr(t).clamp(-4, 5))
    resting = (clipped.log_snr_slope(t) == 0).any()
    assert resting
    assert (clipped.log_snr_slope(t)[(free.log_snr(t) > -4) & (free.log_snr(t) < 5)] == -clipped.fall).all()


def test_a_map_of_equally_spaced_positions_is_staggered():
    tokens, window = 6, 2.5
    b = (tokens - 1) / (tokens - 1 + window)
    t = grid(40)
    wanted = Staggered(tokens, window).log_snr(t)
    torch.testing.assert_close(PerPixel(grid(tokens), b).log_snr(t), wanted)
    torch.testing.assert_close(Columns((1, 1, tokens), b).log_snr(t)[:, 0, 0], wanted)
    assert fraction_to_window(1 - b, tokens) == pytest.approx(window)


def test_b_0_is_joint():
    t = grid(20)
    assert torch.equal(Columns((1, 2, 3), 0.0).log_snr(t), Together((1, 2, 3)).log_snr(t))


def test_given_tokens_rest_at_the_clean_level():
    inner = Staggered(4, 2, Cosine())
    known = torch.tensor([True, False, True, False])
    schedule, t = Given(inner, known), grid(30)
    clean = inner.log_snr(torch.zeros(1).double())[0]
    assert torch.equal(schedule.log_snr(t)[:, known], clean[known].expand(30, 2))
    assert (schedule.log_snr_slope(t)[:, known] == 0).all()
    assert torch.equal(schedule.log_snr(t)[:, ~known], inner.log_snr(t)[:, ~known])


# Broadcasting and refusals


def test_expand_to():
    x = torch.zeros(2, 3, 4, 5)
    assert expand_to(torch.zeros(2, 3), x).shape == (2, 3, 1, 1)
    assert expand_to(torch.zeros(1, 1, 4, 5), x).shape == (1, 1, 4, 5)
    with pytest.raises(ValueError, match=r"x: must have shape .* got \(2, 3, 4, 5\)"):
        expand_to(torch.zeros(2, 4), x)
    with pytest.raises(ValueError, match="x: must have shape"):
        expand_to(torch.zeros(1, 1, 1, 1, 1), x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Staggered(0, 1), ValueError, "tokens: must be at least 1, got 0"),
        (lambda: Staggered(2.0, 1), TypeError, "tokens: must be an integer"),
        (lambda: Staggered(3, 0), ValueError, "window: must be positive, got 0"),
        (lambda: Staggered(3, "8"), TypeError, "window: must be a number, got str"),
        (lambda: Staggered(3, math.nan), ValueError, "window: must be positive, got nan"),
        (lambda: Staggered(3, 1, order=[0, 1, 1]), ValueError, "order: must be a permutation"),
        (lambda: Staggered(3, 1, order=[0, 1]), ValueError, "order: must be a permutation"),
        (lambda: Staggered(3, 1, order=[0.0, 1.0, 2.0]), TypeError, "order: must hold integers"),
        (lambda: Staggered(3, 1, lambda u: u), TypeError, "curve: must be a Curve"),
        (lambda: Staggered(3, 1, scaling="edm"), ValueError, "scaling: must be one of vp, ve, flow, got 'edm'"),
        (lambda: Triangular(3, 0), ValueError, "steps_per_token: must be at least 1"),
        (lambda: Triangular(3, 2, -1), ValueError, "lag: must be at least 0"),
        (lambda: Rolling(0), ValueError, "window: must be at least 1"),
        (lambda: Together((3, 0)), ValueError, "shape: must be at least 1, got 0"),
        (lambda: Independent((3,)).draw(0), ValueError, "batch: must be at least 1"),
        (lambda: PerPixel(torch.tensor([0.0, 1.5]), 0.5), ValueError, r"order: values must lie in \[0, 1\]"),
        (lambda: PerPixel(torch.tensor([0.0, math.nan]), 0.5), ValueError, "order: values must lie"),
        (lambda: PerPixel(torch.tensor([0, 1]), 0.5), TypeError, "order: must be a float tensor"),
        (lambda: Columns((1, 4, 4), 1.0), ValueError, r"b: must be in \[0, 1\), got 1.0"),
        (lambda: Columns((4,), 0.5), ValueError, r"shape: must end in \(Y, X\)"),
        (lambda: ComponentLinear(torch.tensor([1.0, 0.0])), ValueError, "variances: must be positive and finite"),
        (lambda: ComponentLinear(torch.tensor([1.0, math.inf])), ValueError, "variances: must be positive and finite"),
        (lambda: ComponentLinear(VARIANCES, -1.0), ValueError, "a: must be at least 0, got -1"),
        (lambda: ComponentLinear(VARIANCES, 1.0, torch.zeros(3)), ValueError, r"ordering: must have shape \(4,\)"),
        (lambda: ComponentLinear(VARIANCES, 1.0, VARIANCES * math.nan), ValueError, "ordering: must be finite"),
        (lambda: ComponentLinear(VARIANCES, start=-3.0, end=7.0), ValueError, "start: must be finite and greater"),
        (lambda: ComponentLinear(VARIANCES, clip=(5.0, -5.0)), ValueError, r"clip: must be \(least, greatest\)"),
        (lambda: LogLinear(-4.0, 9.0), ValueError, "start: must be finite and greater than end"),
        (lambda: VPLinear(beta_min=5.0, beta_max=1.0), ValueError, "beta_min: must lie in"),
        (lambda: Cosine(s=-1.0), ValueError, "s: must be at least 0"),
        (lambda: Flow(margin=0.0), ValueError, r"margin: must be in \(0, 0.5\)"),
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), ValueError, "sigma_min: must lie in"),
        (lambda: EDM(rho=0.0), ValueError, "rho: must be positive"),
        (lambda: Given(Staggered(3, 1), torch.tensor([True])), ValueError, r"known: must have shape \(3,\)"),
        (lambda: Given(Staggered(3, 1), torch.zeros(3)), TypeError, "known: must be a bool tensor"),
        (lambda: Staggered(3, 1).log_snr(torch.zeros(2, 4)), ValueError, r"t: must have shape \(B,\) or"),
        (lambda: Staggered(3, 1).log_snr(torch.zeros(2, dtype=torch.long)), TypeError, "t: must be a float tensor"),
        (lambda: Staggered(3, 1).times(0), ValueError, "steps: must be at least 1"),
        (lambda: fraction_to_window(0.0, 3), ValueError, r"fraction: must lie in \(0, 1\]"),
    ],
)
def test_arguments_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Broken(Schedule):
    shape, scaling = (2,), "vp"

    def __init__(self, log_snr, slope=None, scaling="vp"):
        self._log_snr, self.scaling = log_snr, scaling
        self._slope = slope or (lambda t: torch.full((len(t), 2), -10.0, dtype=t.dtype))

    def log_snr(self, t):
        return self._log_snr(t)

    def log_snr_slope(self, t):
        return self._slope(t)


def pair(t: torch.Tensor) -> torch.Tensor:
    return (5 - 10 * t)[:, None].expand(-1, 2)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Broken(lambda t: pair(t) + 12 * (t > 0.7)[:, None] * torch.tensor([0.0, 1.0])),
         r"Broken.log_snr: must not increase with t; at t = 0.70\d*, token \(1,\) the rise is"),
        (Broken(lambda t: torch.where(t[:, None] > 0.5, math.nan, pair(t))), "Broken.log_snr: must be finite"),
        (Broken(lambda t: torch.where(t[:, None] == 0, math.inf, pair(t))), "Broken.log_snr: must be finite; at t = 0,"),
        (Broken(lambda t: pair(t)[:, 0]), r"Broken.log_snr: must have shape \(B, \*shape\) = \(257, 2\), got \(257,\)"),
        (Broken(pair, lambda t: -pair(t)[:, :1]), "Broken.log_snr_slope: must have shape"),
        (Broken(pair, lambda t: torch.full((len(t), 2), 10.0, dtype=t.dtype)), "Broken.log_snr_slope: must be <= 0"),
        (Broken(pair, lambda t: torch.full((len(t), 2), -math.inf, dtype=t.dtype)), "log_snr_slope: must be finite"),
        (Broken(pair, lambda t: torch.full((len(t), 2), -20.0, dtype=t.dtype)), "must be the derivative of log_snr"),
        (Broken(pair, scaling="none"), "scaling: must be one of"),
    ],
)  # fmt: skip
def test_check_schedule_refuses_by_name(broken, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(broken)


def test_check_schedule_accepts_the_unbroken_one():
    check_schedule(Broken(pair))


@pytest.mark.parametrize(
    "schedule",
    [
        Staggered(1000, 1, Cosine()),
        Staggered(600, 0.5, EDM()),
        ComponentLinear(torch.logspace(1, -5, 3072, dtype=torch.float64), 3.0, clip=(-6.0, 7.0)),
    ],
    ids=["narrow", "gaps", "many components"],
)
def test_check_schedule_accepts_large_ones(schedule):
    check_schedule(schedule)
