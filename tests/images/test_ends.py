"""The two ends of the family against dedicated implementations: joint (standard) diffusion in pixels, and the chain rule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sae_diffusion.diffusion.bases import make_basis
from sae_diffusion.diffusion.likelihood import log_likelihood
from sae_diffusion.diffusion.schedules import sampling_times
from sae_diffusion.diffusion.solvers import sample
from sae_diffusion.images.components import Whitened
from sae_diffusion.images.schedule import ScheduleConfig, in_flight, make_schedule
from torch import Tensor

BASES = ("identity", "pca", "dct", "fourier", "haar")
SHAPE = (1, 4, 4)
D = 16


def images(count: int = 300) -> Tensor:
    """Correlated images with a mean, to fit bases to."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(D, D, generator=generator, dtype=torch.float64) * torch.linspace(1, 0.1, D).double()
    return (torch.randn(count, D, generator=generator, dtype=torch.float64) @ mixing + 0.3).view(count, *SHAPE)


class Mixture:
    """Two normals of variance `v` in pixels: every density and posterior mean of x + sigma eps is known."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.means = 1.5 * torch.randn(2, D, generator=generator, dtype=torch.float64)
        self.v = 0.3

    def log_parts(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        spread = self.v + torch.as_tensor(sigma, dtype=torch.float64) ** 2
        square = (x.flatten(1)[:, None] - self.means).square().sum(-1)
        return math.log(0.5) - 0.5 * square / spread - 0.5 * D * torch.log(2 * math.pi * spread)

    def log_density(self, x: Tensor, sigma: float) -> Tensor:
        return self.log_parts(x, sigma).logsumexp(1)

    def posterior_mean(self, x: Tensor, sigma: Tensor) -> Tensor:
        share = self.log_parts(x, sigma).softmax(1)
        spread = self.v + sigma**2
        return ((self.v * x.flatten(1) + sigma**2 * (share @ self.means)) / spread).view(x.shape)


def pixel_log_snr(basis: Whitened, log_snr: Tensor) -> Tensor:
    """Equal noise sigma in pixels is log-SNR log Sigma_i - 2 log sigma of whitened component i: one number for all."""
    value = log_snr - basis.variance.log()
    assert (value - value.flatten(1)[:, :1, None, None]).abs().max() < 1e-9
    return value.flatten(1)[:, 0]


def in_components(mixture: Mixture, basis: Whitened):
    """A pixel-space denoiser behind the interface of components."""

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        sigma = (-0.5 * pixel_log_snr(basis, log_snr)[0]).exp()
        x = basis.inverse(z / torch.sigmoid(log_snr).sqrt())
        return basis.forward(mixture.posterior_mean(x, sigma))

    return denoise


def standard_sampler(mixture: Mixture, x: Tensor, sigmas: Tensor) -> Tensor:
    """Standard diffusion in pixels, nothing else: Euler steps of dx/dsigma = (x - D) / sigma, then D."""
    for sigma, below in itertools.pairwise(sigmas):
        x = x + (below - sigma) * (x - mixture.posterior_mean(x, sigma)) / sigma
    return mixture.posterior_mean(x, sigmas[-1])


@pytest.mark.parametrize("name", BASES)
def test_joint_end_samples_as_standard_diffusion_in_pixels(name):
    """Softness 1 in any basis: the same noise gives the same images, step for step."""
    mixture, basis = Mixture(), Whitened.fit(name, images(), 0.0)
    schedule = make_schedule(ScheduleConfig(softness=1.0), basis)
    times = sampling_times(schedule, 24)
    levels = schedule.log_snr(times)
    sigmas = (-0.5 * pixel_log_snr(basis, levels)).exp()
    noise = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = sigmas[0] * noise
    z = torch.sigmoid(levels[0]).sqrt() * basis.forward(start)
    ours = basis.inverse(sample(in_components(mixture, basis), z, schedule, times, solver="ddim"))
    dedicated = standard_sampler(mixture, start, sigmas)
    assert dedicated.std() > 0.5
    assert (ours - dedicated).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["identity", "pca", "haar"])
def test_joint_end_has_the_likelihood_of_standard_diffusion_in_pixels(name):
    """log p of the data plus the noise of t = 0, whatever the basis."""
    mixture, basis = Mixture(), Whitened.fit(name, images(), 0.0)
    schedule = make_schedule(ScheduleConfig(softness=1.0, start=6.0, end=-11.0, least=-11.0), basis)
    sigma = float((-0.5 * pixel_log_snr(basis, schedule.log_snr(torch.zeros(1, dtype=torch.float64)))).exp())
    x = mixture.means.view(2, *SHAPE) + 0.4
    ours = log_likelihood(in_components(mixture, basis), x, schedule, basis=basis, tolerance=1e-4)
    # nats per dimension
    assert (ours - mixture.log_density(x, sigma)).abs().max() < 1e-3 * D


# One component after another: correlated normals with the exact denoiser.
N = 8
CHAIN = (1, 2, 4)


def correlation() -> Tensor:
    generator = torch.Generator().manual_seed(8)
    a = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    covariance = a @ a.T + 0.3 * torch.eye(N, dtype=torch.float64)
    deviation = covariance.diagonal().sqrt()
    return covariance / deviation[:, None] / deviation


def chain_basis(name: str) -> Whitened:
    """Distinct variances, in an order that is not that of memory."""
    rank = torch.tensor([3, 0, 6, 1, 7, 2, 5, 4], dtype=torch.float64)
    return Whitened(make_basis(name, CHAIN), torch.full(CHAIN, 0.1), 2.0 ** (-rank / 2).view(CHAIN))


def gaussian_denoise(z: Tensor, log_snr: Tensor) -> Tensor:
    """E[z0 | z] of N(0, correlation): R A (A R A + noise^2)^-1 z."""
    level = log_snr[0].flatten()
    signal, noise2 = torch.sigmoid(level).sqrt(), torch.sigmoid(-level)
    r = correlation()
    gain = r * signal @ torch.linalg.inv(signal[:, None] * r * signal + torch.diag(noise2))
    return (z.flatten(1) @ gain.T).view(z.shape)


def one_after_another(noise: Tensor, order: list[int]) -> Tensor:
    """The dedicated sequential sampler: component by component from its exact conditional, given those before it."""
    r, out, seen = correlation(), torch.zeros_like(noise), []
    for i in order:
        mean, variance = torch.zeros(len(noise), dtype=torch.float64), r[i, i]
        if seen:
            weights = torch.linalg.solve(r[seen][:, seen], r[seen, i])
            mean, variance = out[:, seen] @ weights, variance - r[i, seen] @ weights
        out[:, i] = mean + variance.sqrt() * noise[:, i]
        seen.append(i)
    return out


def chain_rule(z: Tensor, order: list[int]) -> Tensor:
    """sum_i log p(z_i | those before it)."""
    r, total, seen = correlation(), torch.zeros(len(z), dtype=torch.float64), []
    for i in order:
        mean, variance = torch.zeros(len(z), dtype=torch.float64), r[i, i]
        if seen:
            weights = torch.linalg.solve(r[seen][:, seen], r[seen, i])
            mean, variance = z[:, seen] @ weights, variance - r[i, seen] @ weights
        total += -0.5 * ((z[:, i] - mean) ** 2 / variance + (2 * math.pi * variance).log())
        seen.append(i)
    return total


HARD = ScheduleConfig(softness=1 / 50, start=12.0, end=-12.0, least=-12.0, most=12.0)  # 50 ln 2 > 24: windows disjoint


@pytest.mark.parametrize("name", ["identity", "haar"])
def test_autoregressive_end_samples_as_the_sequential_sampler(name):
    """The flow of one component given clean ones before it is the monotone map of its conditional: the same noise
    gives the same sample. Joint generation from this noise gives the symmetric map R^(1/2) instead."""
    basis = chain_basis(name)
    schedule = make_schedule(HARD, basis)
    assert in_flight(schedule) * N == pytest.approx(1.0)
    order = basis.variance.flatten().argsort(descending=True).tolist()
    assert order == [1, 3, 5, 0, 7, 6, 2, 4]
    noise = torch.randn(64, *CHAIN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = sample(gaussian_denoise, noise, schedule, sampling_times(schedule, 900), solver="heun").flatten(1)
    dedicated = one_after_another(noise.flatten(1), order)
    values, vectors = torch.linalg.eigh(correlation())
    symmetric = noise.flatten(1) @ (vectors * values.sqrt() @ vectors.T)
    joint = make_schedule(ScheduleConfig(softness=math.inf, start=12.0, end=-12.0, least=-12.0, most=12.0), basis)
    together = sample(gaussian_denoise, noise, joint, sampling_times(joint, 100), solver="heun").flatten(1)
    # noise e^-6 is left at t = 0, signal e^-6 at t = 1
    assert (ours - dedicated).abs().max() < 0.02
    assert (together - symmetric).abs().max() < 0.02
    assert (symmetric - dedicated).abs().max() > 0.5


@pytest.mark.parametrize("name", ["identity", "dct"])
def test_autoregressive_end_has_the_likelihood_of_the_chain_rule(name):
    basis = chain_basis(name)
    schedule = make_schedule(HARD, basis)
    order = basis.variance.flatten().argsort(descending=True).tolist()
    z = one_after_another(torch.randn(4, N, generator=torch.Generator().manual_seed(6), dtype=torch.float64), order)
    x = basis.inverse(z.view(4, *CHAIN))
    ours = log_likelihood(gaussian_denoise, x, schedule, basis=basis, tolerance=1e-6)
    expected = chain_rule(z, order) - basis.deviation.log().sum()
    assert (ours - expected).abs().max() < 1e-3 * N
