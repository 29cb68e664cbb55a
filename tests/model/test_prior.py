"""The prior of a frame, and the preconditioning and the loss around it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from networks import changed_frames, clip, fresh, small
from sae_diffusion.diffusion.forcing import forcing_loss
from sae_diffusion.diffusion.loss import denoising_loss
from sae_diffusion.diffusion.sampler import SamplerConfig, generate
from sae_diffusion.model import ModelConfig
from sae_diffusion.model.prior import FramePrior
from test_flight import CASES, run_cached
from test_parity import check

from sae_kernels import token_noise_eps

PREVIOUS = {"prior": "previous-frame", "change_std": 0.3}


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("level", [0.0, 0.4, 30.0])
def test_is_the_conditional_distribution_of_a_random_walk(block, level):
    """Of a frame j steps after y ~ N(0, d^2), which is seen with noise."""
    d, c = 0.8, 0.3
    prior = FramePrior(ModelConfig(prior="previous-frame", sigma_data=d, change_std=c, frames_per_block=block))
    seen = torch.randn(1, 2 * block, 2, dtype=torch.float64)
    mean, std = prior(seen, torch.full((1, 2 * block), level, dtype=torch.float64))
    # y ~ N(0, d^2) and x_j = y + j steps of variance c^2; what is seen is y + level eps
    gain = d**2 / (d**2 + level**2)
    for j in range(block):
        variance = d**2 + (j + 1) * c**2 - gain * d**2
        torch.testing.assert_close(mean[0, block + j], gain * seen[0, block - 1], rtol=1e-12, atol=0)
        assert std[0, block + j].square().item() == pytest.approx(variance, rel=1e-12)
    assert (mean[:, :block] == 0).all() and (std[:, :block] == d).all()


def test_frames_after_the_one_before():
    prior = FramePrior(ModelConfig(**PREVIOUS))
    seen, sigma = torch.randn(2, 4, 3, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    mean, std = prior(seen, sigma)
    later = prior(seen[:, 2:], sigma[:, 2:], (seen[:, 1], sigma[:, 1]))
    assert torch.equal(later[0], mean[:, 2:]) and torch.equal(later[1], std[:, 2:])
    assert prior(seen[:, :1], sigma[:, :1]) is None
    assert FramePrior(ModelConfig())(seen, sigma) is None


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_denoiser_preconditions_around_it(copies):
    net = small(**PREVIOUS, sigma_data=0.7)
    x, sigma, actions = clip(net, 2, 4, 1 + copies)
    with torch.no_grad():
        got = net(x, sigma, actions, noisy_copies=copies)
        output = net(x, sigma, actions, noisy_copies=copies, model_output=True)
    before, level = x[:, :3], sigma[:, :3]  # of frames 1 to 3
    w = 0.49 / (0.49 + level**2)
    mean = torch.cat([torch.zeros_like(x[:, :1]), before * w[..., None, None, None]], dim=1).repeat(
        1, 1 + copies, 1, 1, 1
    )
    first = torch.full_like(level[:, :1], 0.49)
    variance = torch.cat([first, w * level**2 + 0.09], dim=1).repeat(1, 1 + copies)[..., None, None, None]
    s = sigma[..., None, None, None]
    want = mean + variance / (s**2 + variance) * (x - mean) + s * (variance / (s**2 + variance)).sqrt() * output
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_network_sees_the_difference_and_the_frame_in_unit_variance(monkeypatch):
    net = fresh(
        **PREVIOUS, sigma_data=0.7, patch_size=2, height=16, channel_mult=(1,), video_attention=(), frame_attention=()
    )
    x, sigma, actions = clip(net, 1, 3, 2)
    seen = []
    run = net.unet.forward
    monkeypatch.setattr(net.unet, "forward", lambda inputs, *a: (seen.append(inputs), run(inputs, *a))[1])
    with torch.no_grad():
        net(x, sigma, actions)
    shown = torch.nn.functional.pixel_shuffle(seen[0].transpose(1, 2), 2)
    mean, std = (t.repeat(1, 2, *[1] * (t.ndim - 2)) for t in net.prior(x[:, :3], sigma[:, :3]))
    wide = (slice(None), slice(None), None, None, None)
    torch.testing.assert_close(shown[:, :, :2], (x - mean) / (sigma**2 + std**2).sqrt()[wide])
    torch.testing.assert_close(shown[:, :, 2:], x / (sigma**2 + 0.49).sqrt()[wide])


def test_untrained_network_gives_the_posterior_mean():
    """With an output of 0, D is the mean of x given its noisy copy under the prior; at great noise the prior's mean."""
    net = fresh(**PREVIOUS)
    torch.nn.init.zeros_(net.unet.out_gain)
    x, _, actions = clip(net, 1, 3, 2)
    sigma = torch.full((1, 6), 0.01, dtype=torch.float64)
    sigma[:, 3:] = 1e5
    with torch.no_grad():
        got = net(x, sigma, actions)[:, 4:]
    torch.testing.assert_close(got, x[:, :2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("copies", [1, 3])
def test_frames_reach_each_other_as_without_it(copies):
    net = small(**PREVIOUS)
    x, sigma, actions = clip(net, 2, 5, 1 + copies)
    for j in (0, 3, 4):
        changed = changed_frames(net, x, sigma, actions, j, noisy_copies=copies).reshape(1 + copies, 5)
        expected = torch.zeros(1 + copies, 5, dtype=torch.bool)
        expected[0, j:], expected[1:, j + 1 :] = True, True
        assert torch.equal(changed, expected)
    changed = changed_frames(net, x, sigma, actions, 7, noisy_copies=copies)
    assert changed.nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("chunks", [(5,), (1, 1, 3), (2, 3)])
def test_cached_inference_is_the_training_pass(chunks):
    check(small(**PREVIOUS), 6, chunks, batch=2)
    check(small(**PREVIOUS, frames_per_block=2, window=1, sink=1), 11, [2 * n for n in chunks])


@pytest.mark.parametrize("changes", CASES[:8], ids=str)
@pytest.mark.parametrize("cached", [0, 2, 6])
def test_flight_is_the_end_of_the_plain_causal_pass(changes, cached):
    net = small(**changes, **PREVIOUS)
    x, sigma, actions = clip(net, 2, 8)
    with torch.no_grad():
        want = net(x, sigma, actions, noisy_copies=0)[:, cached:]
    got, cache = run_cached(net, x, sigma, actions, cached)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert ("last.frame" in cache.tensors()) == (cached > 0)


class OnlyDenoised(torch.nn.Module):
    """A denoiser that cannot give its network's output."""

    def __init__(self, net) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


@pytest.mark.parametrize("spatial_only", [False, True])
@pytest.mark.parametrize("objective", ["teacher_forcing", "forcing"])
@pytest.mark.parametrize("block", [1, 2])
def test_loss_of_the_output_is_the_weighted_error_of_the_denoised(objective, spatial_only, block):
    net = fresh(**PREVIOUS, frames_per_block=block)
    x0, _, actions = clip(net, 2, 4)
    copies = 2 if objective == "teacher_forcing" else 0
    sigmas = clip(net, 2, 4, 1 + copies, seed=3)[1]
    options = {"seed": 5, "prior": net.prior, "spatial_only": spatial_only}

    def loss(network):
        if objective == "forcing":
            return forcing_loss(network, x0, actions, sigmas, **options)
        return denoising_loss(network, x0, actions, sigmas, noisy_copies=copies, **options)

    torch.testing.assert_close(loss(net), loss(OnlyDenoised(net)), rtol=1e-9, atol=1e-12)


def test_loss_is_the_distance_from_the_recorded_frame():
    """By hand from D, around a context that is not what was recorded."""
    net = fresh(**PREVIOUS)
    x0, _, actions = clip(net, 1, 3)
    context, sigmas = x0 + 0.5, torch.tensor([[0.1, 0.1, 0.1, 2.0, 0.3, 5.0]], dtype=torch.float64)
    shown = []

    def watched(x, sigma, actions, **options):
        shown.append(x)
        return net(x, sigma, actions, **options)

    got = denoising_loss(watched, x0, actions, sigmas, noisy_copies=1, seed=1, prior=net.prior, context=context)
    plain = denoising_loss(watched, x0, actions, sigmas, noisy_copies=1, seed=1, prior=net.prior)
    assert not torch.equal(got, plain)
    torch.testing.assert_close(shown[0][:, :3] - shown[1][:, :3], torch.full_like(x0, 0.5))
    assert torch.equal(shown[0][:, 3:], shown[1][:, 3:])
    denoised = net(shown[0], sigmas, actions)[:, 3:]
    _, std = net.prior(shown[0][:, :3], sigmas[:, :3])
    weight = (sigmas[:, 3:] ** 2 + std**2) / (sigmas[:, 3:] * std) ** 2
    torch.testing.assert_close(got, weight * (denoised - x0).square().mean(dim=(2, 3, 4)), rtol=1e-9, atol=0)


def test_config_names_the_field():
    with pytest.raises(ValueError, match=r"^prior: must be one of .* got 'last'"):
        ModelConfig(prior="last")
    with pytest.raises(ValueError, match=r"^change_std: must be positive"):
        ModelConfig(change_std=0.0)
    assert ModelConfig().input_channels == 3
    assert dataclasses.replace(ModelConfig(patch_size=2), prior="previous-frame").input_channels == 24


@pytest.mark.parametrize("context", [None, 2])
def test_sampling_begins_around_what_is_expected(context):
    """The first state that the network is shown is sigma_max times noise around the frame before."""
    net = small(**PREVIOUS, num_actions=0)
    given = None if context is None else clip(net, 1, context)[0]
    config = SamplerConfig(sampling_steps=2, sigma_max=10.0, solver="euler")
    shown, denoise = [], net.denoise

    def watched(x, sigma, actions, cache):
        shown.append(x)
        return denoise(x, sigma, actions, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net, "denoise", watched)
        generate(net, given, None, 1, config, seed=3)
    noise = token_noise_eps((2, 8, 8), seed=3, offset=(context or 0) << 32, dtype=torch.float32).double()
    mean = torch.zeros(()) if given is None else given[0, -1] / (1 + config.context_sigma**2)
    torch.testing.assert_close(shown[0][0, 0], 10 * noise + mean)
