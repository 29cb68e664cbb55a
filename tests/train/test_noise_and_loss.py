from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_diffusion.diffusion.loss import LossNormalizer, _basis, denoising_loss, loss_weight
from sae_diffusion.diffusion.noise import NoiseConfig, derive_seed, sample_sigmas
from sae_diffusion.model import Denoiser, ModelConfig

from sae_kernels import FrameLayout, token_noise
from sae_kernels.testing import assert_within_budget


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    batch=st.integers(0, 3),
    frames=st.integers(1, 7),
    copies=st.integers(0, 3),
    block=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_sigmas_are_one_for_the_context_of_a_clip_and_one_for_each_noisy_block(batch, frames, copies, block, seed):
    config = NoiseConfig(context_sigma_max=0.5)
    sigmas = sample_sigmas(config, batch, frames, copies, generator(seed), frames_per_block=block)
    assert sigmas.shape == (batch, (1 + copies) * frames) and sigmas.dtype == torch.float32
    clean, noisy = sigmas[:, :frames], sigmas[:, frames:].unflatten(1, (copies, frames)) if copies else None
    assert (clean == clean[:, :1]).all()
    assert ((clean >= config.context_sigma_min) & (clean <= 0.5)).all()
    if noisy is not None:
        for frame in range(frames):
            first = frame // block * block
            assert torch.equal(noisy[..., frame], noisy[..., first])
        levels = noisy[..., ::block].flatten()
        assert levels.unique().numel() == levels.numel()


def test_sigmas_have_the_distributions_asked_for():
    config = NoiseConfig(mean=0.7, std=1.3, context_sigma_max=0.4)
    sigmas = sample_sigmas(config, 4000, 3, 2, generator(0)).double()
    log = sigmas[:, 3:].log().flatten()
    # 5 standard errors of mean and deviation over 24000 draws
    assert abs(log.mean() - 0.7) < 5 * 1.3 / math.sqrt(len(log))
    assert abs(log.std() - 1.3) < 5 * 1.3 / math.sqrt(2 * len(log))
    assert abs(sigmas[:, 0].mean() - 0.2) < 5 * 0.4 / math.sqrt(12 * 4000)
    assert sigmas[:, 0].max() > 0.39
    assert (sample_sigmas(NoiseConfig(context_sigma_max=0.0), 2, 3, 1)[:, :3] == 0.002).all()


@pytest.mark.parametrize(
    ("field", "value"), [("std", -1.0), ("context_sigma_max", -0.1), ("context_sigma_min", 0.0), ("mean", math.nan)]
)
def test_noise_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        NoiseConfig(**{field: value})


def test_derived_seeds_differ_and_fit_a_signed_64_bit_integer():
    seeds = {derive_seed(s, purpose, i) for s in (0, 1) for purpose in range(4) for i in range(50)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, 1, 2) == derive_seed(3, 1, 2)


class Recorder:
    """Returns `factor(sigma) * x` and keeps what it was given."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x, sigma, actions, **options):
        self.x, self.sigma, self.actions, self.options = x, sigma, actions, options
        return self.factor(sigma)[:, :, None, None, None] * x


def white_clips(seed=0, dtype=torch.float32):
    return torch.randn(6, 4, 3, 16, 16, generator=generator(seed), dtype=dtype)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_loss_of_an_untrained_network_is_one_and_of_zero_output_its_weight(sigma_data):
    """D = c_skip x gives lambda sigma^2 d^2 / (sigma^2 + d^2) = 1 at every level; D = 0 gives lambda d^2."""
    x0 = sigma_data * white_clips()
    sigmas = sample_sigmas(NoiseConfig(0.0, 1.0), 6, 4, 2, generator(1))
    skip = Recorder(lambda s: sigma_data**2 / (s**2 + sigma_data**2))
    losses = denoising_loss(skip, x0, None, sigmas, noisy_copies=2, seed=5, sigma_data=sigma_data)
    assert losses.shape == (6, 8) and losses.dtype == torch.float32
    # the mean over 768 elements of a squared normal: relative standard error sqrt(2 / 768)
    assert (losses - 1).abs().max() < 5 * math.sqrt(2 / 768)
    assert abs(losses.mean() - 1) < 5 * math.sqrt(2 / 768 / 48)
    zero = denoising_loss(Recorder(torch.zeros_like), x0, None, sigmas, noisy_copies=2, seed=5, sigma_data=sigma_data)
    power = x0.double().square().mean(dim=(2, 3, 4)).repeat(1, 2)
    expected = (sigmas[:, 4:].double() ** 2 + sigma_data**2) / (sigmas[:, 4:].double() * sigma_data) ** 2 * power
    torch.testing.assert_close(zero.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(loss_weight(sigmas, sigma_data), (sigmas**2 + sigma_data**2) / (sigmas * sigma_data) ** 2)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
def test_loss_is_the_plain_formula_on_the_noisy_half(copies, spatial):
    x0 = white_clips(dtype=torch.float64)
    sigmas = sample_sigmas(NoiseConfig(), 6, 4, copies, generator(2)).double()
    actions = torch.arange(24).reshape(6, 4)
    net = Recorder(lambda s: 1 / (1 + s))
    losses = denoising_loss(net, x0, actions, sigmas, noisy_copies=copies, seed=9, offset=3, spatial_only=spatial)
    layout = FrameLayout(4, 256, noisy_copies=copies)
    x = token_noise(x0, torch.ones_like(sigmas), sigmas, layout, seed=9, offset=3)
    if spatial:
        assert torch.equal(net.x, x[:, 4:]) and torch.equal(net.sigma, sigmas[:, 4:])
        assert torch.equal(net.actions, actions.repeat(1, copies)) and net.options == {"spatial_only": True}
    else:
        assert torch.equal(net.x, x) and torch.equal(net.sigma, sigmas)
        assert torch.equal(net.actions, actions) and net.options == {"noisy_copies": copies}
    for copy in range(copies):
        for frame in range(4):
            place = (1 + copy) * 4 + frame
            s = sigmas[:, place]
            error = (x[:, place] / (1 + s)[:, None, None, None] - x0[:, frame]).square().mean(dim=(1, 2, 3))
            torch.testing.assert_close(losses[:, copy * 4 + frame], error * (s**2 + 1) / s**2, rtol=1e-12, atol=0)


def network(dtype, **changes):
    """A small denoiser whose gains are not zero, so that every parameter has a gradient."""
    torch.manual_seed(3)
    config = ModelConfig(
        height=8, width=8, channels=2, model_channels=8, channel_mult=(1, 2), blocks_per_level=1, video_attention=(4,),
        head_dim=8, num_actions=3, **changes,
    )  # fmt: skip
    net = Denoiser(config).to(dtype)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gain"):
                p.fill_(0.7)
    return net


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("copies", "spatial", "changes"),
    [
        (1, False, {}),
        (3, False, {"temporal_mixing": "gated"}),
        (3, True, {}),
        (1, True, {"patch_size": 2}),
        (3, False, {"patch_size": 2, "sigma_data": 0.5}),
    ],
)
def test_loss_from_the_model_output_is_the_loss_of_the_denoised_frames(copies, spatial, changes, autocast):
    """Loss and gradient of all parameters, in fp32 and under bf16 autocast, each route against fp64."""
    x0 = torch.randn(2, 3, 2, 8, 8, generator=generator(1))
    actions = torch.randint(-1, 3, (2, 3), generator=generator(2))
    sigmas = sample_sigmas(NoiseConfig(), 2, 3, copies, generator(4))

    def route(dtype, raw):
        net = network(dtype, **changes)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            losses = denoising_loss(
                net, x0.to(dtype), actions, sigmas.to(dtype), noisy_copies=copies, seed=-5, offset=2,
                spatial_only=spatial, sigma_data=net.config.sigma_data, model_output=raw,
            )  # fmt: skip
        # Frames weigh differently, so that one frame's noise cannot stand in for another's.
        total = (losses * torch.linspace(1, 2, losses.numel()).view_as(losses)).sum()
        grads = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
        return losses.detach(), torch.cat([g.flatten() for g in grads if g is not None])

    gold, plain, fused = route(torch.float64, False), route(torch.float32, False), route(torch.float32, None)
    unit = torch.bfloat16 if autocast else torch.float32
    assert not torch.equal(fused[0], plain[0])
    for name, got, want, eager in zip(("loss", "gradient"), fused, gold, plain, strict=True):
        assert got.dtype == torch.float32
        assert_within_budget(got.to(unit), want, eager.to(unit), name)
    # In fp64 the routes differ by the normals alone, which have fp32 precision.
    for got, want in zip(route(torch.float64, True), gold, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_denoiser_gives_its_model_output():
    """D = c_skip x + c_out F, with every flag; and the output F is asked for by name only where it is given."""
    for changes, options, streams in (({}, {"noisy_copies": 2}, 3), ({"patch_size": 2}, {"spatial_only": True}, 1)):
        net = network(torch.float64, **changes)
        x = torch.randn(2, 2 * streams, 2, 8, 8, generator=generator(5), dtype=torch.float64)
        sigma = torch.rand(2, 2 * streams, generator=generator(6), dtype=torch.float64) + 0.1
        raw, d = net(x, sigma, model_output=True, **options), net(x, sigma, **options)
        s = sigma[:, :, None, None, None]
        torch.testing.assert_close(d, x / (s**2 + 1) + s / (s**2 + 1).sqrt() * raw, rtol=1e-12, atol=1e-12)


def test_loss_refuses_what_does_not_fit():
    x0, sigmas = white_clips(), torch.ones(6, 8)
    with pytest.raises(ValueError, match=r"^noisy_copies: .* got 0"):
        denoising_loss(torch.zeros_like, x0, None, sigmas, noisy_copies=0, seed=0)
    with pytest.raises(ValueError, match=r"^sigmas: .* \(6, 12\), got \(6, 8\)"):
        denoising_loss(torch.zeros_like, x0, None, sigmas, noisy_copies=2, seed=0)
    with pytest.raises(ValueError, match=r"^x0: "):
        denoising_loss(torch.zeros_like, x0[0], None, sigmas, noisy_copies=1, seed=0)


def spread_sigmas(n: int) -> torch.Tensor:
    return (torch.randn(n, generator=generator(3)) * 2).exp()


def test_normaliser_recovers_a_function_of_its_basis():
    """log10 loss = basis . c: the ridge solution is (G + r)^-1 G c, and with r -> 0 c itself."""
    wanted = torch.tensor([-0.8, 0.5, -0.2, 0.1, 0.3, 0.0, -0.15], dtype=torch.float64)
    sigma = spread_sigmas(4000)
    loss = 10.0 ** (_basis(sigma) @ wanted)
    normalizer = LossNormalizer(4000, 1, ridge=1e-4)
    normalizer.record(sigma, loss)
    gram = _basis(sigma).T @ _basis(sigma) / 4000
    ridged = torch.linalg.solve(gram + 1e-4 * torch.eye(7, dtype=torch.float64), gram @ wanted)
    # losses and sigmas are kept in fp32: relative error 2^-24, in log10 below 1e-7
    torch.testing.assert_close(normalizer.coefficients, ridged, rtol=0, atol=1e-5)
    exact = LossNormalizer(4000, 1, ridge=1e-12)
    exact.record(sigma, loss)
    torch.testing.assert_close(exact.coefficients, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(exact(sigma, loss.float()), torch.ones(4000), rtol=1e-4, atol=0)
    # a fit to noisy losses brings their logarithm to mean zero
    noisy = loss * (0.5 * torch.randn(4000, generator=generator(4)).double()).exp()
    normalizer.record(sigma, noisy)
    assert normalizer(sigma, noisy.float()).log().mean().abs() < 0.01


def test_normaliser_follows_its_fit_as_far_as_the_basis_reaches_and_stays_there():
    coefficients = torch.tensor([-0.8, 0.5, -0.2, 0.1, 0.3, 0.4, -0.15], dtype=torch.float64)
    normalizer = LossNormalizer()
    normalizer.load_state_dict(normalizer.state_dict() | {"coefficients": coefficients})
    for u in (-9.0, -math.pi, -3.1, -0.7, 0.0, 3.1, math.pi, 9.0):
        x = min(max(u, -math.pi), math.pi)
        cosines, sines = ([f(n * x) for n in (1, 2, 3)] for f in (math.cos, math.sin))
        want = 10 ** sum(c * b for c, b in zip(coefficients.tolist(), [0.5, *cosines, *sines], strict=True))
        got = normalizer.expected_loss(torch.tensor(10.0**u, dtype=torch.float64))
        assert got.item() == pytest.approx(want, rel=torch.finfo(torch.float32).eps)


def test_normaliser_starts_at_one_fits_on_time_and_keeps_the_last_pairs():
    normalizer = LossNormalizer(10, 3)
    sigma = spread_sigmas(4)
    for record in range(1, 6):
        before = normalizer.coefficients
        normalizer.record(sigma, torch.full((4,), float(record)))
        assert torch.equal(before, normalizer.coefficients) == (record % 3 != 0)
        if record < 3:
            assert torch.equal(normalizer(sigma, sigma), sigma)
    # 20 pairs through 10 slots: those of records 3 (two), 4 and 5 remain
    assert sorted(normalizer.losses.tolist()) == [3.0] * 2 + [4.0] * 4 + [5.0] * 4
    many = LossNormalizer(10, 1)
    many.record(torch.arange(1.0, 26.0), torch.arange(25.0))
    assert sorted(zip(many.losses.tolist(), many.sigmas.tolist())) == [(i, i + 1) for i in range(15, 25)]


def test_normaliser_takes_a_loss_of_nothing_for_the_least_it_knows():
    """log10 of 1e-8, so that one frame of a constant image does not draw the fit to minus infinity."""
    normalizer = LossNormalizer(400, 1, ridge=1e-12)
    normalizer.record(spread_sigmas(400), torch.zeros(400))
    least = torch.tensor([-16.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(normalizer.coefficients, least, rtol=0, atol=1e-5)
    assert normalizer.expected_loss(torch.ones(1)).item() == pytest.approx(1e-4)  # fits end at four decades


def test_normaliser_has_no_gradient_and_leaves_out_what_is_not_finite():
    sigma = spread_sigmas(200)
    clean, spoilt = LossNormalizer(300, 1), LossNormalizer(300, 1)
    clean.record(sigma, sigma.sqrt())
    spoilt.record(torch.cat([sigma, sigma[:2]]), torch.cat([sigma.sqrt(), torch.tensor([math.inf, math.nan])]))
    assert torch.equal(clean.coefficients, spoilt.coefficients)
    loss = torch.ones(3, requires_grad=True)
    level = sigma[:3].clone().requires_grad_()
    clean(level, loss).sum().backward()
    torch.testing.assert_close(loss.grad, 1 / clean.expected_loss(sigma[:3]), rtol=0, atol=0)
    assert level.grad is None
    with pytest.raises(ValueError, match=r"^loss: .* 3, got 2"):
        clean.record(torch.ones(3), torch.ones(2))


def test_normaliser_state_is_plain_tensors_and_continues_bit_for_bit():
    one, other = LossNormalizer(50, 2), LossNormalizer(50, 2)
    for i in range(3):
        one.record(spread_sigmas(30), spread_sigmas(30) * (i + 1))
    state = one.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    other.load_state_dict(state)
    for n in (one, other):
        n.record(spread_sigmas(30), spread_sigmas(30) * 9)
    assert one.records == other.records == 4
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert not torch.equal(one.coefficients, torch.zeros(7))
