"""Sampling with a window of frames in flight: against block-by-block sampling and against a sampler without a cache."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from networks import clip, cut, small
from sae_diffusion.diffusion.config import Solver
from sae_diffusion.diffusion.sampler import (
    SamplerConfig,
    check_independent_levels,
    first_step,
    generate,
    generate_window,
    iter_frames,
    sigma_schedule,
)
from sae_diffusion.diffusion.schedules import EDM, Rolling, Triangular, scales_of

from sae_kernels import token_noise_eps

VARIANTS = {
    "heun": {},
    "euler": {"solver": "euler"},
    "churn": {"churn": 2.0},
    "dpm++2m": {"solver": "dpm++2m"},
    "ancestral": {"solver": "ancestral"},
    "stochastic-heun": {"solver": "stochastic-heun"},
    "context-noise": {"context_noise": 0.2},
    "guided": {"guidance": 1.5},
}


def config(**changes) -> SamplerConfig:
    return SamplerConfig(**({"sampling_steps": 4, "sigma_min": 0.1, "sigma_max": 10.0} | changes))


@pytest.mark.parametrize(("variant", "block"), [*((v, 1) for v in VARIANTS), ("heun", 2), ("churn", 2)])
def test_window_of_one_block_is_block_by_block_sampling_bit_for_bit(variant, block):
    net = small(frames_per_block=block)
    x, _, actions = clip(net, 2, 8)
    settings = config(**VARIANTS[variant])
    plain = generate(net, x[:, :4], actions, 4, settings, seed=3)
    assert torch.equal(generate(net, x[:, :4], actions, 4, settings, seed=3, in_flight=block), plain)
    wide = generate(net, x[:, :4], actions, 4, settings, seed=3, in_flight=2 * block)
    assert not torch.equal(wide, plain)
    with pytest.warns(DeprecationWarning, match="generate_window: is now called generate"):
        assert torch.equal(generate_window(net, x[:, :4], actions, 4, 2 * block, settings, seed=3), wide)


def test_autoguidance_in_a_window_of_one_block():
    net, guide = small(), small(temporal_mixing="gated")
    x, _, actions = clip(net, 1, 5)
    settings = config(guidance=2.0, guidance_kind="auto", sampling_steps=2)
    plain = generate(net, x[:, :2], actions, 3, settings, guide=guide)
    assert torch.equal(generate(net, x[:, :2], actions, 3, settings, guide=guide, in_flight=1), plain)
    wide = generate(net, x[:, :2], actions, 3, settings, guide=guide, in_flight=2)
    assert not torch.equal(wide, generate(net, x[:, :2], actions, 3, settings, guide=net, in_flight=2))


def noise_of(net, frame: int, seed: int, draw: int = 0) -> torch.Tensor:
    shape = (net.config.channels, net.config.height, net.config.width)
    return token_noise_eps(shape, seed=seed, offset=(frame << 32) | draw, device="cpu", dtype=torch.float32).double()


def without_cache(net, given, actions, frames: int, window: int, settings: SamplerConfig, seed: int) -> torch.Tensor:
    """One sample: every step evaluates the plain causal pass over the whole video, levels by `Triangular`.

    Solvers as their papers have them for x = x0 + sigma eps: EDM's algorithms 1 and 2, DPM-Solver++ with h = the step
    of -ln sigma (Lu et al. 2022, algorithm 2), and the posterior of Ho et al. 2020 for ancestral sampling.
    """
    n, steps, block = given.shape[1], settings.sampling_steps, net.config.frames_per_block
    sigmas = sigma_schedule(settings).tolist()
    to_go = Triangular(frames // block, steps, steps * block // window).levels().repeat_interleave(block, dim=1)
    x = [sigmas[0] * noise_of(net, n + i, seed) for i in range(frames)]
    last: dict[int, tuple[torch.Tensor, float]] = {}  # x0_hat of the step before and its h
    churn = {"stochastic-heun": 40.0}.get(settings.solver, 0.0) if settings.churn is None else settings.churn

    def estimate(x, level: list[float]) -> list[torch.Tensor]:
        begun = [i for i in range(frames) if level[i] < sigmas[0] or ready[i]]
        told = [settings.context_sigma] * n + [level[i] or settings.context_sigma for i in begun]
        video = torch.cat([given[0], *(x[i][None] for i in begun)])[None]
        with torch.no_grad():
            out = net(video, torch.tensor([told], dtype=torch.float64), cut(actions, 0, n + len(begun)), noisy_copies=0)
        return list(out[0, n:])

    for now, then in zip(to_go.tolist(), to_go[1:].tolist()):
        ready = [a != b for a, b in zip(now, then)]
        moving = [i for i in range(frames) if ready[i]]
        level, target = ([sigmas[steps - k] for k in row] for row in (now, then))
        fresh = {i: noise_of(net, n + i, seed, steps - now[i] + 1) for i in moving}
        for i in moving if churn else ():
            raised = level[i] * (1 + min(churn / steps, math.sqrt(2) - 1))
            x[i] = x[i] + settings.churn_noise * math.sqrt(raised**2 - level[i] ** 2) * fresh[i]
            level[i] = raised
        d, ends = estimate(x, level), list(x)
        slopes = {i: (x[i] - d[i]) / level[i] for i in moving}
        for i in moving:
            ratio = target[i] / level[i]
            if settings.solver == "ancestral":
                ends[i] = d[i] + ratio**2 * (x[i] - d[i]) + target[i] * math.sqrt(1 - ratio**2) * fresh[i]
            elif settings.solver == "dpm++2m":
                h, guess = -math.log(ratio) if ratio else math.inf, d[i]
                if i in last and ratio:
                    before, h_last = last[i]
                    guess = (1 + h / (2 * h_last)) * d[i] - h / (2 * h_last) * before
                ends[i], last[i] = ratio * x[i] - math.expm1(-h) * guess, (d[i], h)
            else:
                ends[i] = x[i] + (target[i] - level[i]) * slopes[i]
        if "heun" in settings.solver:
            d = estimate(ends, target)
            for i in moving:
                if target[i] > 0:
                    ends[i] = x[i] + (target[i] - level[i]) * 0.5 * (slopes[i] + (ends[i] - d[i]) / target[i])
        x = ends
    return torch.stack(x)[None]


UNCACHED = {
    "one": (1, {}),
    "two": (2, {}),
    "four": (4, {"temporal_mixing": "gated"}),
    "attention-window": (2, {"window": 1, "sink": 1}),
    "blocks": (4, {"frames_per_block": 2}),
}


@pytest.mark.parametrize(
    ("solver", "name"),
    [("heun", name) for name in UNCACHED]
    + [(solver, name) for solver in get_args(Solver) if solver != "heun" for name in ("two", "blocks")],
)
def test_window_equals_sampling_without_a_cache(solver, name):
    window, changes = UNCACHED[name]
    net = small(**changes)
    x, _, actions = clip(net, 1, 8)
    settings = config(solver=solver)
    got = generate(net, x[:, :2], actions, 6, settings, seed=5, in_flight=window)
    want = without_cache(net, x[:, :2], actions, 6, window, settings, seed=5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * want.abs().max().item())


def test_solvers_are_different_and_noise_is_where_it_belongs():
    net = small()
    x, _, actions = clip(net, 1, 4)

    def draw(**changes) -> torch.Tensor:
        return generate(net, x[:, :2], actions, 2, config(**changes), seed=5)

    drawn = [draw(solver=solver) for solver in get_args(Solver)]
    for a, b in itertools.combinations(drawn, 2):
        assert not torch.allclose(a, b, atol=1e-3)
    assert torch.equal(draw(solver="stochastic-heun"), draw(solver="heun", churn=40.0))
    assert torch.equal(draw(solver="heun"), draw(solver="heun", churn=0.0))
    assert torch.equal(draw(solver="stochastic-heun", churn=3.0), draw(churn=3.0))


class Recorder(torch.nn.Module):
    """Remembers (first frame in flight, levels) of every evaluation; its estimate is zero."""

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(channels=1, height=2, width=2, frames_per_block=block)
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.calls: list[tuple[int, list[float]]] = []

    def expected(self, cache):
        return None

    def new_cache(self, batch):
        return SimpleNamespace(batch=batch, frames=0)

    def prefill(self, x, sigma, actions, cache):
        cache.frames += x.shape[1]

    def denoise(self, x, sigma, actions, cache):
        self.calls.append((cache.frames, sigma[0].tolist()))
        return torch.zeros_like(x)

    denoise_sequence = denoise


@pytest.mark.parametrize(("window", "steps"), [(1, 5), (2, 8), (4, 8), (8, 8)])
def test_levels_are_the_lower_triangular_schedule_in_the_ve_scaling(window, steps):
    net, frames = Recorder(), 6
    settings = config(sampling_steps=steps, solver="euler")
    generate(net, None, None, frames, settings, in_flight=window)
    schedule = Triangular(frames, steps, steps // window, EDM(0.1, 10.0, settings.rho))
    levels = schedule.levels()
    assert len(net.calls) == schedule.macro_steps == steps + (frames - 1) * steps // window
    for row, after, (first, told) in zip(levels, levels[1:], net.calls):
        moving = [i for i in range(frames) if row[i] != after[i]]
        assert list(range(first, first + len(told))) == moving
        # A frame with k steps to go is at u = (k - 1) / (N - 1) of the EDM curve.
        log_snr = schedule.curve((row[moving] - 1).double() / (steps - 1))
        assert scales_of(log_snr, "ve")[1].tolist() == pytest.approx(told, rel=1e-10)


@pytest.mark.parametrize(("window", "steps"), [(3, 8), (5, 7), (4, 4)])
def test_any_window_holds_no_more_than_its_frames_and_gives_each_all_levels(window, steps):
    net, frames = Recorder(), 12
    settings = config(sampling_steps=steps, solver="euler")
    generate(net, None, None, frames, settings, in_flight=window)
    assert max(len(told) for _, told in net.calls) == window
    seen: dict[int, list[float]] = {i: [] for i in range(frames)}
    for first, told in net.calls:
        for i, sigma in enumerate(told):
            seen[first + i].append(sigma)
    for levels in seen.values():
        assert levels == pytest.approx(sigma_schedule(settings)[:-1].tolist())
    rolling = Rolling(window)
    for block in range(frames):  # a block enters less than a step before the rolling window's clock says
        clock = torch.tensor(first_step(block, steps, window) * window / steps, dtype=torch.float64)
        assert 1 - rolling.progress_at(clock + window / steps, torch.tensor(block)) >= 0
        assert block - window / steps < clock <= block + 1e-9


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_noise_belongs_to_the_frame_whatever_the_window(solver):
    """With an estimate that does not depend on other frames the window must not matter, churn included."""
    settings = config(sampling_steps=6, churn=2.0, context_noise=0.1, solver=solver)
    plain = generate(Recorder(), None, None, 5, settings, seed=2, batch=2)
    for window in (1, 2, 4):
        assert torch.equal(generate(Recorder(), None, None, 5, settings, seed=2, batch=2, in_flight=window), plain)
    blocks = generate(Recorder(2), None, None, 6, settings, seed=2)
    assert torch.equal(generate(Recorder(2), None, None, 6, settings, seed=2, in_flight=6), blocks)


def test_heun_evaluates_twice_but_for_a_last_step_of_one():
    net = Recorder()
    generate(net, None, None, 4, config(sampling_steps=4), in_flight=2)
    # 4 + 3 * 2 steps; the first block is gone when the second evaluation of its last step is made.
    assert len(net.calls) == 2 * 10 - 1
    sizes = [(first, len(told)) for first, told in net.calls]
    assert sizes[:10] == [(0, 1)] * 4 + [(0, 2)] * 3 + [(1, 1)] + [(1, 2)] * 2


def test_frames_come_one_at_a_time_and_the_cache_stays_bounded():
    net = small(window=1)
    cache = net.new_cache(1)
    sizes, held = [], 0
    for done, frame in enumerate(
        iter_frames(net, None, clip(net, 1, 9)[2], 9, config(solver="euler"), in_flight=3, cache=cache), start=1
    ):
        assert frame.shape == (1, 1, 2, 8, 8)
        assert cache.frames == done
        sizes.append(cache.nbytes)
        held += frame.isfinite().all().item()
    assert held == 9
    assert len(set(sizes)) == 1


def test_a_cache_is_continued_after_its_frames():
    net = small()
    x, _, actions = clip(net, 1, 7)
    whole = generate(net, x[:, :3], actions, 4, config(), seed=1, in_flight=2)
    cache = net.new_cache(1)
    net.prefill(x[:, :3], torch.full((1, 3), 0.05, dtype=torch.float64), actions[:, :3], cache)
    later = generate(net, None, actions[:, 3:], 4, config(), seed=1, cache=cache, in_flight=2)
    assert torch.equal(whole, later)
    assert cache.frames == 7
    assert math.isfinite(whole.abs().max().item())


def test_callback_counts_frames():
    counts: list[int] = []
    net = small(frames_per_block=2)
    generate(net, None, None, 6, config(solver="euler"), callback=counts.append, in_flight=4)
    assert counts == [2, 4, 6]


@pytest.mark.parametrize(
    ("window", "block", "message"),
    [
        (0, 1, "in_flight: must be a positive multiple of frames_per_block = 1, got 0"),
        (3, 2, "in_flight: must be a positive multiple of frames_per_block = 2, got 3"),
        (5, 1, "in_flight: must be at most sampling_steps = 4 blocks"),
    ],
)
def test_windows_that_break_their_rule_are_refused(window, block, message):
    with pytest.raises(ValueError, match=message):
        iter_frames(small(frames_per_block=block), None, None, 4, config(), in_flight=window)


def test_requests_are_checked_as_those_of_the_block_sampler():
    with pytest.raises(ValueError, match="actions: must have one for each"):
        iter_frames(small(), None, torch.zeros(1, 3, dtype=torch.int64), 4, config(), in_flight=2)


@pytest.mark.parametrize("state", [{}, {"train_config": {}}, {"train_config": {"objective": "teacher"}}])
def test_checkpoints_of_teacher_forcing_are_refused(state):
    with pytest.raises(ValueError, match=r"in_flight: .* --objective forcing.*objective 'teacher_forcing'"):
        check_independent_levels(state)
    check_independent_levels({"train_config": {"objective": "forcing"}})
