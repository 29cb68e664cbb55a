"""The sampler against denoisers that are known in closed form.

The data are a stationary Gaussian chain: frame i given frame i-1 is N(a x_{i-1}, s^2) in every pixel, a frame by itself
N(0, s^2 / (1 - a^2)). The optimal denoiser of N(m, v) data is D(x; sigma) = (v x + sigma^2 m) / (v + sigma^2), and its ODE from
sigma_max to 0 maps x to m + (x - m) sqrt(v / (v + sigma_max^2)).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from sae_diffusion.diffusion.sampler import SamplerConfig, generate, iter_frames, sigma_schedule
from sae_diffusion.model import Denoiser, ModelConfig

from sae_kernels import token_noise_eps

DECAY, STD = 0.8, 0.5
MARGINAL_STD = STD / math.sqrt(1 - DECAY**2)
EXACT = SamplerConfig(sampling_steps=16, sigma_min=1e-4, sigma_max=20.0)


class Chain(torch.nn.Module):
    """The exact denoiser of the chain, with a cache that holds the last frame; actions are added to the mean."""

    def __init__(
        self, pixels: int = 4, block: int = 1, dtype: torch.dtype = torch.float64, decay: float = DECAY
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(channels=2, height=pixels, width=pixels, frames_per_block=block)
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=dtype))
        self.decay, self.levels, self.prefills = decay, [], []

    def expected(self, cache):
        return None

    def new_cache(self, batch):
        return SimpleNamespace(batch=batch, frames=0, last=None)

    def prefill(self, x, sigma, actions, cache):
        self.prefills.append((x, sigma, actions))
        cache.frames, cache.last = cache.frames + x.shape[1], x[:, -1:]
        return x

    def denoise(self, x, sigma, actions, cache):
        self.levels.append(sigma[0, 0].item())
        if cache.last is None:
            return self(x, sigma, actions, spatial_only=True)
        return posterior(x, sigma, self.decay * cache.last + shift(actions, x), STD**2)

    def forward(self, x, sigma, actions=None, *, noisy_copies=1, spatial_only=False):
        assert spatial_only
        return posterior(x, sigma, shift(actions, x), MARGINAL_STD**2)


def posterior(x, sigma, mean, variance):
    sigma = sigma[:, :, None, None, None]
    return (variance * x + sigma**2 * mean) / (variance + sigma**2)


def shift(actions, x):
    return 0.0 if actions is None else actions.to(x.dtype)[:, :, None, None, None]


def start(model, config, frame, seed=0, sample=0):
    """x at sigma_max for one frame."""
    shape = (model.config.channels, model.config.height, model.config.width)
    eps = token_noise_eps(shape, seed=seed, offset=(frame << 32) | (sample << 16), device="cpu", dtype=torch.float32)
    return config.sigma_max * eps.to(model.weight.dtype)


def solution(x, mean, std, config):
    return mean + (x - mean) * std / math.sqrt(std**2 + config.sigma_max**2)


def chain_solution(model, config, context, frames, seed=0):
    """The exact result of `generate` for one sample, frame after frame."""
    last, result = context[0, -1], []
    for frame in range(context.shape[1], context.shape[1] + frames):
        last = solution(start(model, config, frame, seed), model.decay * last, STD, config)
        result.append(last)
    return torch.stack(result)[None]


def context(batch=1, frames=2, pixels=4):
    return torch.randn(
        batch, frames, 2, pixels, pixels, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )


def test_schedule_values():
    config = SamplerConfig(sampling_steps=5, sigma_min=0.25, sigma_max=16.0, rho=2.0)
    # sqrt(sigma) falls linearly from 4 to 0.5.
    expected = [4.0**2, 3.125**2, 2.25**2, 1.375**2, 0.5**2, 0.0]
    assert torch.allclose(sigma_schedule(config), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    default = sigma_schedule(SamplerConfig())
    assert len(default) == 33 and default[-1] == 0 and (default.diff() < 0).all()
    assert default[0].item() == pytest.approx(80.0, rel=1e-12) and default[31].item() == pytest.approx(0.002, rel=1e-12)
    assert sigma_schedule(SamplerConfig(sampling_steps=1)).tolist() == pytest.approx([80.0, 0.0])


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("dpm++2m", 2), ("euler", 1)])
def test_solver_converges_to_the_exact_solution_with_its_order(solver, order):
    model, given = Chain(), context()
    errors = []
    for steps in (64, 128, 256):
        config = dataclasses.replace(EXACT, sampling_steps=steps, solver=solver)
        got = generate(model, given, None, 3, config)
        errors.append((got - chain_solution(model, config, given, 3)).abs().max().item())
    assert errors[-1] < (1e-3 if order == 2 else 1e-1)
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_starts_from_nothing_with_the_marginal_and_keeps_the_chain():
    """Frames drawn from nothing have the chain's variance and correlation, which needs generated frames in the cache."""
    model = Chain(pixels=48)
    x = generate(model, None, None, 4, dataclasses.replace(EXACT, sampling_steps=32), batch=2)
    frames = x.transpose(0, 1).flatten(1)
    count = frames.shape[1]
    for i, frame in enumerate(frames):
        assert frame.var().item() == pytest.approx(MARGINAL_STD**2, rel=5 * math.sqrt(2 / count)), i
    for first, second in itertools.pairwise(frames):
        assert torch.corrcoef(torch.stack([first, second]))[0, 1].item() == pytest.approx(
            DECAY, abs=5 / math.sqrt(count)
        )


@pytest.mark.parametrize(
    "noise", [{"churn": 20.0}, {"solver": "stochastic-heun"}, {"solver": "ancestral", "sampling_steps": 512}],
    ids=["churn", "stochastic-heun", "ancestral"],
)  # fmt: skip
def test_added_noise_keeps_the_marginal(noise):
    model = Chain(pixels=64)
    config = dataclasses.replace(EXACT, **({"sampling_steps": 64} | noise))
    x = generate(model, None, None, 1, config, batch=2)
    count = x.numel()
    assert x.var().item() == pytest.approx(MARGINAL_STD**2, rel=5 * math.sqrt(2 / count) + 0.01)
    assert abs(x.mean().item()) < 5 * MARGINAL_STD / math.sqrt(count)
    # Stochastic: the result forgets where it started.
    begin = start(model, config, 0)
    assert abs(torch.corrcoef(torch.stack([x[0].flatten(), begin.flatten()]))[0, 1].item()) < 0.5


@pytest.mark.parametrize(("churn", "rise"), [(1.6, 0.1), (1e9, math.sqrt(2) - 1)])
def test_churn_raises_the_level(churn, rise):
    model = Chain()
    generate(model, context(), None, 1, dataclasses.replace(EXACT, churn=churn, solver="euler"))
    expected = [sigma * (1 + rise) for sigma in sigma_schedule(EXACT).tolist()[:-1]]
    assert model.levels == pytest.approx(expected, rel=1e-12)


def test_churn_acts_between_its_limits_only():
    model = Chain()
    plain = generate(model, context(), None, 1, EXACT)
    outside = dataclasses.replace(EXACT, churn=20.0, churn_min=30.0)
    assert torch.equal(generate(model, context(), None, 1, outside), plain)
    inside = dataclasses.replace(EXACT, churn=20.0, churn_max=1.0)
    assert not torch.equal(generate(model, context(), None, 1, inside), plain)


@pytest.mark.parametrize("kind", ["context", "auto"])
def test_guidance_formula(kind):
    """One Euler step from sigma_max to 0 returns D itself: D_weak + w (D - D_weak)."""
    model, guide, given, w = Chain(), Chain(decay=0.3), context(), 2.5
    config = SamplerConfig(sampling_steps=1, sigma_max=3.0, guidance=w, guidance_kind=kind)
    cache, guide_cache, other = model.new_cache(1), guide.new_cache(1), given.flip(1)
    model.prefill(given, None, None, cache)
    guide.prefill(other, None, None, guide_cache)
    if kind == "auto":
        got = generate(model, None, None, 1, config, guide=guide, cache=cache, guide_cache=guide_cache)
        assert cache.frames == guide_cache.frames == 3
    else:
        got = generate(model, None, None, 1, config, cache=cache)
    x = start(model, config, given.shape[1])
    sigma = torch.full((1, 1), 3.0, dtype=torch.float64)
    strong = posterior(x[None, None], sigma, DECAY * given[:, -1:], STD**2)
    if kind == "auto":
        weak = posterior(x[None, None], sigma, 0.3 * other[:, -1:], STD**2)
    else:
        weak = posterior(x[None, None], sigma, 0.0, MARGINAL_STD**2)
    assert torch.allclose(got, weak + w * (strong - weak), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "expected"),
    [("heun", 2 * 16 - 1), ("stochastic-heun", 2 * 16 - 1), ("euler", 16), ("dpm++2m", 16), ("ancestral", 16)],
)
def test_number_of_evaluations(solver, expected):
    model = Chain()
    generate(model, context(), None, 3, dataclasses.replace(EXACT, solver=solver))
    assert len(model.levels) == 3 * expected


def test_context_and_generated_frames_enter_the_cache_at_the_context_level():
    model, given = Chain(), context(batch=2)
    x = generate(model, given, None, 3, dataclasses.replace(EXACT, context_sigma=0.07))
    entered = torch.cat([frames for frames, _, _ in model.prefills], dim=1)
    assert torch.equal(entered, torch.cat([given, x], dim=1))
    assert all((sigma == 0.07).all() for _, sigma, _ in model.prefills)


def test_context_noise_is_added_to_what_enters_the_cache_only():
    model, given = Chain(pixels=32), context(pixels=32)
    x = generate(model, given, None, 1, dataclasses.replace(EXACT, context_noise=0.1))
    entered = torch.cat([frames for frames, _, _ in model.prefills], dim=1)
    added = entered - torch.cat([given, x], dim=1)
    assert added.std().item() == pytest.approx(0.1, rel=0.1)
    assert (added[:, 0] - added[:, 1]).std().item() == pytest.approx(0.1 * math.sqrt(2), rel=0.1)
    # It is other noise than that which the frame began from.
    begin = start(model, EXACT, 2)
    assert abs(torch.corrcoef(torch.stack([added[0, 2].flatten(), begin.flatten()]))[0, 1].item()) < 0.2


@pytest.mark.parametrize("noise", [{}, {"churn": 10.0}, {"solver": "ancestral"}, {"solver": "dpm++2m"}])
@pytest.mark.parametrize("block", [1, 2])
def test_two_calls_that_share_a_cache_equal_one(noise, block):
    config = dataclasses.replace(EXACT, context_noise=0.1, **noise)
    given, model = context(batch=2), Chain(block=block)
    actions = torch.arange(16).view(2, 8)
    whole = generate(model, given, actions, 6, config, seed=5)
    cache = model.new_cache(2)
    first = generate(model, given, actions[:, :4], 2, config, seed=5, cache=cache)
    second = generate(model, None, actions[:, 4:], 4, config, seed=5, cache=cache)
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert cache.frames == 8
    # The noise knows nothing of how many frames are asked for, nor of the samples beside it.
    assert torch.equal(generate(model, given, actions[:, :4], 2, config, seed=5), whole[:, :2])
    assert torch.equal(generate(model, given[:1], actions[:1], 6, config, seed=5), whole[:1])


def small_network(**options) -> Denoiser:
    config = {"height": 8, "width": 8, "channels": 2, "model_channels": 8, "channel_mult": (1, 2), "head_dim": 8}
    config |= {"blocks_per_level": 1, "video_attention": (4,), "num_actions": 3}
    torch.manual_seed(1)
    network = Denoiser(ModelConfig(**config, **options)).eval()
    for name, parameter in network.named_parameters():
        if "gain" in name:
            torch.nn.init.constant_(parameter, 0.7)
    return network


@pytest.mark.parametrize("block", [1, 2])
def test_two_calls_of_the_real_network_equal_one(block):
    network = small_network(window=2, frames_per_block=block)
    config = SamplerConfig(sampling_steps=3, churn=2.0, guidance=1.5)
    given, actions = torch.randn(2, 2, 2, 8, 8), torch.randint(3, (2, 8))
    whole = generate(network, given, actions, 6, config, seed=5)
    cache = network.new_cache(2)
    first = generate(network, given, actions[:, :4], 2, config, seed=5, cache=cache)
    second = generate(network, None, actions[:, 4:], 4, config, seed=5, cache=cache)
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    # The past matters: the guided result of other context frames is another one.
    assert not torch.equal(generate(network, -given, actions, 6, config, seed=5), whole)


def test_memory_is_bounded_under_a_window():
    network = small_network(window=3, sink=1)
    cache, sizes = network.new_cache(1), []
    for _ in iter_frames(network, None, None, 24, SamplerConfig(sampling_steps=1), cache=cache):
        sizes.append(cache.nbytes)
    assert cache.frames == 24
    assert len(set(sizes)) == 1


def test_seeds_frames_and_samples_have_their_own_noise():
    model, config = Chain(decay=0.0), SamplerConfig(sampling_steps=2)
    given = torch.zeros(2, 1, 2, 4, 4, dtype=torch.float64)
    draws = [x for seed in (0, 1) for x in generate(model, given, None, 2, config, seed=seed).flatten(0, 1)]
    for i, x in enumerate(draws):
        assert all(not torch.equal(x, y) for y in draws[:i])


def test_actions_reach_the_frames_they_cause():
    model, given = Chain(), context()
    actions = torch.tensor([[9, 9, 1, 2, 3]])
    still, moved = generate(model, given, actions * 0, 3, EXACT), generate(model, given, actions, 3, EXACT)
    mean = torch.zeros(())
    for i, action in enumerate((1, 2, 3)):
        mean = DECAY * mean + action
        # The ODE moves a sample by its shifted mean, less the share that sigma_max still remembers.
        assert (moved - still)[:, i].mean().item() == pytest.approx(mean.item(), rel=0.05)
    assert [a.tolist() for _, _, a in model.prefills[-4:]] == [[[9, 9]], [[1]], [[2]], [[3]]]


def test_yields_block_by_block_and_reports_progress():
    model = Chain(block=2, dtype=torch.float32)
    frames = iter_frames(model, None, None, 6, EXACT, batch=3)
    first = next(frames)
    assert first.shape == (3, 2, 2, 4, 4) and first.dtype == torch.float32
    assert len(model.levels) == 2 * EXACT.sampling_steps - 1
    seen = []
    generate(model, None, None, 6, EXACT, callback=seen.append)
    assert seen == [2, 4, 6]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"context": torch.zeros(1, 2, 3, 4, 4)},
            r"context: must have shape .* \(2, 4, 4\), got \(1, 2, 3, 4, 4\)",
        ),
        (
            {"context": torch.zeros(1, 1, 2, 4, 4)},
            "context: frames must be a multiple of frames_per_block = 2, got 1",
        ),
        ({"num_frames": 3}, "num_frames: .* got 3"),
        ({"actions": torch.zeros(1, 5)}, "actions: .* 0 context and 4 new frames = 4, got 5"),
        ({"actions": torch.zeros(1, 4), "batch": 2}, "actions: batch must be 2, got 1"),
        ({"cache": Chain().new_cache(3), "batch": 2}, "cache: batch must be 2, got 3"),
        ({"guide": Chain()}, "guide: must be None unless guidance_kind is 'auto'"),
        ({"config": SamplerConfig(guidance_kind="auto", guidance=2.0)}, "guide: must be a second network"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"context": None, "actions": None, "num_frames": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        iter_frames(Chain(block=2), **arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [("sampling_steps", 0), ("sigma_min", 0.0), ("rho", 0.0), ("solver", "rk4"), ("guidance_kind", "x")],
)
def test_bad_config_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: must be"):
        SamplerConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": "ancestral", "churn": 1.0}, r"churn: must be 0 for solver 'ancestral', got 1\.0"),
        ({"solver": "dpm++2m", "churn": 1.0}, r"churn: must be 0 for solver 'dpm\+\+2m', got 1\.0"),
        ({"solver": "stochastic-heun", "churn": 0.0}, r"churn: must be > 0 for solver 'stochastic-heun', got 0\.0"),
        ({"churn": -1.0}, r"churn: must be at least 0, got -1\.0"),
        ({"solver": "ddim"}, r"solver: must be one of euler, heun, dpm\+\+2m, ancestral, stochastic-heun, got 'ddim'"),
    ],
)
def test_churn_and_solver_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**fields)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        iter_frames(Chain(), None, None, 2, EXACT, windows=2)
