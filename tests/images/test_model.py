"""The U-Net on components: Gaussian optimum when untrained, and it sees the noise state of every component."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from sae_diffusion.diffusion.likelihood import dequantise
from sae_diffusion.images.components import Whitened, gaussian_bits_per_dim
from sae_diffusion.images.data import digits, middle
from sae_diffusion.images.model import ComponentUNet, NetConfig, NoiseState

BASES = ("identity", "pca", "dct", "fourier", "haar")
SMALL = NetConfig(channels=8, groups=5, token_channels=8, heads=2)


@functools.lru_cache
def basis_of(name: str) -> Whitened:
    images = digits()
    return Whitened.fit(name, middle(torch.from_numpy(images.train), images.levels), images.step)


def randomise(net: torch.nn.Module) -> None:
    """Zero-initialised layers would hide what they are connected to."""
    generator = torch.Generator().manual_seed(5)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", BASES)
def test_whitened_components_have_mean_0_and_variance_1_under_dequantisation(name):
    images, basis = digits(), basis_of(name)
    pixels = torch.from_numpy(images.train)
    total = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    for seed in range(4):
        x = dequantise(pixels, 17, seed=seed, dtype=torch.float64)
        z = basis.forward(x)
        assert (basis.inverse(z) - x).abs().max() < 1e-12
        total += torch.stack([z.mean(0), z.square().mean(0)]) / 4
    # dequantisation alone is random: deviation of a mean of 4 x 1438 squares of uniform numbers 0.9 / sqrt(5752)
    assert total[0].abs().max() < 5 / math.sqrt(5752)
    assert (total[1] - 1).abs().max() < 5 * 0.9 / math.sqrt(5752)


@pytest.mark.parametrize("name", BASES)
def test_log_det_is_that_of_the_jacobian(name):
    basis = basis_of(name)
    jacobian = torch.autograd.functional.jacobian(basis.forward, torch.zeros(1, 8, 8, dtype=torch.float64))
    assert torch.linalg.slogdet(jacobian.view(64, 64))[1].item() == pytest.approx(basis.log_det, abs=1e-8)


def test_gaussian_bits_of_a_normal_sample():
    """Entropy of N(0, variance) over its level: what independent normals cost on their own samples."""
    basis = basis_of("pca")
    z = torch.randn(4000, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bits = gaussian_bits_per_dim(basis, basis.inverse(z), 2 / 17)
    entropy = 0.5 * math.log2(2 * math.pi * math.e) + basis.deviation.log2().mean().item() - math.log2(2 / 17)
    assert bits.mean().item() == pytest.approx(entropy, abs=4 * bits.std().item() / math.sqrt(4000))


@pytest.mark.parametrize("name", BASES)
def test_untrained_is_the_gaussian_optimum(name):
    """x0_hat = E[x0 | z] for independent N(0, 1) components: signal z, at any log-SNR of each."""
    basis = basis_of(name)
    net = ComponentUNet(SMALL, basis, 17)
    z, log_snr = torch.randn(2, 1, 8, 8).double(), 8 * torch.randn(2, 1, 8, 8).double()
    # a PCA subtracts the data's mean and it is put back: fp32 sums of 64 products
    rounding = 64 * 2**-24 * net.offset.abs().max()
    assert (net(z, log_snr) - torch.sigmoid(log_snr).sqrt() * z).abs().max() <= rounding
    randomise(net)
    assert (net(z, log_snr) - torch.sigmoid(log_snr).sqrt() * z).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "groups"), [("pca", 5), ("haar", 64), ("identity", 1)])
def test_every_component_s_noise_level_reaches_every_image(name, groups):
    """64 components in 5 groups: the last group is short."""
    net = ComponentUNet(NetConfig(channels=8, groups=groups, token_channels=8, fourier=0), basis_of(name), 17)
    randomise(net)
    z = torch.randn(2, 1, 8, 8)
    log_snr = torch.randn(2, 1, 8, 8).requires_grad_(True)
    # the tokens alone: what signal and noise do to the image is another way in
    (gradient,) = torch.autograd.grad(net.noise_state(log_snr).square().sum(), log_snr)
    assert (gradient != 0).all()
    moved = log_snr.detach().clone()
    moved[0, 0, 3, 4] += 2.0
    with torch.no_grad():
        old, new = net.residual(z, log_snr), net.residual(z, moved)
    assert (old[0] != new[0]).any() and torch.equal(old[1], new[1])


def test_tokens_group_neighbours_in_the_order_of_generation():
    order = torch.tensor([3.0, 0.0, 2.0, 1.0, 4.0]).view(1, 1, 5)
    state = NoiseState(order, 2, 4)
    assert state.index.tolist() == [1, 3, 2, 0, 4, 4]
    changed = torch.zeros(1, 1, 1, 5)
    changed[0, 0, 0, 0] = 1.0  # of the second group
    old, new = state(torch.zeros(1, 1, 1, 5)), state(changed)
    assert torch.equal(old[:, 0], new[:, 0]) and not torch.equal(old[:, 1], new[:, 1])


def test_cifar_sizes():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8))
    basis = Whitened.fit("haar", middle(images, 256), 2 / 256)
    net = ComponentUNet(NetConfig(channels=8, channel_mult=(1, 1, 2), groups=32), basis, 256)
    randomise(net)
    assert net(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)).shape == (2, 3, 32, 32)


def test_bad_input_is_refused_by_name():
    basis = basis_of("dct")
    net = ComponentUNet(SMALL, basis, 17)
    with pytest.raises(ValueError, match=r"z: must be \(B, 1, 8, 8\), got \(2, 1, 4, 4\)"):
        net(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="log_snr: must have the shape"):
        net(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 1, 1))
    with pytest.raises(ValueError, match="channel_mult: sizes must be divisible by 16 for 5 levels, got 8x8"):
        ComponentUNet(NetConfig(channels=8, channel_mult=(1,) * 5), basis, 17)
    for field, value in (("channels", 12), ("groups", 0), ("blocks", 0), ("channel_mult", ()), ("fourier", -1)):
        with pytest.raises(ValueError, match=field):
            NetConfig(**{field: value})
    with pytest.raises(ValueError, match="deviation: must be positive"):
        Whitened(basis.base, basis.mean, basis.deviation * 0)
    with pytest.raises(ValueError, match="mean: must have the shape"):
        Whitened(basis.base, basis.mean[0], basis.deviation)
