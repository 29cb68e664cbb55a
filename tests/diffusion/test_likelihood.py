"""Log-likelihood by the probability-flow ODE against analytic values, for every basis and family of schedules."""

from __future__ import annotations

import math

import pytest
import torch
from sae_diffusion.diffusion.bases import DCT, PCA, Basis, Identity, component_moments, make_basis
from sae_diffusion.diffusion.likelihood import (
    Prior,
    bits_per_dim,
    dequantise,
    dequantise_log_det,
    log_likelihood,
    standardise_log_det,
)
from sae_diffusion.diffusion.schedules import (
    EDM,
    Columns,
    ComponentLinear,
    Cosine,
    Flow,
    LogLinear,
    PerPixel,
    Rolling,
    Rows,
    Schedule,
    Staggered,
    Together,
    Triangular,
    VPLinear,
    expand_to,
    scales_of,
)

IMAGE, SERIES = (1, 2, 2), (4, 1)


class Gaussian:
    """Normal data with a full covariance, seen in a basis: density, exact denoiser."""

    def __init__(self, shape: tuple[int, ...], basis_name: str = "identity") -> None:
        size = math.prod(shape)
        generator = torch.Generator().manual_seed(5)
        mixing = torch.randn(size, size, generator=generator, dtype=torch.float64) * 0.4
        self.shape, self.size = shape, size
        self.covariance = mixing @ mixing.T + 0.2 * torch.eye(size, dtype=torch.float64)
        self.mean = torch.linspace(-1, 1, size, dtype=torch.float64)
        self.factor = torch.linalg.cholesky(self.covariance)
        self.basis: Basis = make_basis(basis_name, shape, self.draw(400) if basis_name == "pca" else None)
        origin = self.basis.forward(torch.zeros(shape, dtype=torch.float64)).flatten()
        units = torch.eye(size, dtype=torch.float64).view(size, *shape)
        matrix = (self.basis.forward(units).flatten(1) - origin).T
        self.component_mean = matrix @ self.mean + origin
        self.component_covariance = matrix @ self.covariance @ matrix.T

    def draw(self, count: int, seed: int = 0) -> torch.Tensor:
        normals = torch.randn(count, self.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (normals @ self.factor.T + self.mean).view(count, *self.shape)

    def denoiser(self, schedule: Schedule):
        """E[c | x_t], in one linear map for each call."""

        def denoise(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
            level = expand_to(log_snr, x).expand(x.shape)[0].flatten()
            signal, noise = scales_of(level, schedule.scaling)
            gain = self.component_covariance * signal
            inverse = torch.linalg.inv(signal[:, None] * gain + noise.square().diag())
            offset = x.flatten(1) - signal * self.component_mean
            return (self.component_mean + offset @ (gain @ inverse).T).view(x.shape)

        return denoise

    def analytic(self, x: torch.Tensor, schedule: Schedule, smoothed: bool = True) -> torch.Tensor:
        """log density of the data, with the noise of t = 0 in component space or without any."""
        covariance = self.component_covariance
        if smoothed:
            level = schedule.log_snr(torch.zeros(1, dtype=torch.float64))
            zero = torch.zeros(1, *self.shape, dtype=torch.float64)
            covariance = covariance + (-expand_to(level, zero).expand(zero.shape).flatten()).exp().diag()
        normal = torch.distributions.MultivariateNormal(self.component_mean, covariance)
        return normal.log_prob(self.basis.forward(x).flatten(1)) + self.basis.log_det


def families(gaussian: Gaussian) -> dict[str, Schedule]:
    shape = gaussian.shape
    variances = gaussian.component_covariance.diagonal().reshape(shape)
    every: dict[str, Schedule] = {
        "loglinear": Together((), LogLinear()),
        "vplinear": Together((), VPLinear()),
        "cosine": Together((), Cosine()),
        "edm": Together((), EDM()),
        "flow": Together((), Flow()),
        "loglinear-ve": Together((), LogLinear(), scaling="ve"),
        "gud-a0": ComponentLinear(variances, 0.0),
        "gud-a2": ComponentLinear(variances, 2.0, gaussian.basis.ordering()),
        "gud-clipped-flow": ComponentLinear(variances, 1.5, clip=(-4.0, 6.0), scaling="flow"),
    }
    if len(shape) == 3:
        every |= {
            "columns": Columns(shape, 0.5),
            "rows": Rows((1, *shape[1:]), 0.3, Flow()),
            "pixels": PerPixel(torch.linspace(0, 1, 4).view(shape).double(), 0.7),
        }
    else:
        every |= {
            "autoregressive": Staggered(4, 1.0),
            "window3": Staggered(4, 3.0, Flow()),
            "window-below-1": Staggered(4, 0.5),
            "joint": Staggered(4, math.inf, EDM()),
            "pyramid": Triangular(4, 4, 2),
            "rolling-in": Rolling(4, first=True),
        }
    return every


CASES = [
    (basis, shape, family)
    for shape in (IMAGE, SERIES)
    for basis in ("identity", "dct", "fourier", "haar", "pca")
    for family in families(Gaussian(shape))
    if shape == IMAGE or family in ("autoregressive", "window3", "window-below-1", "joint", "pyramid", "rolling-in")
]


@pytest.mark.parametrize(("basis", "shape", "family"), CASES, ids=[f"{b}-{len(s)}d-{f}" for b, s, f in CASES])
def test_exact_denoiser_gives_the_analytic_value(basis, shape, family):
    gaussian = Gaussian(shape, basis)
    schedule = families(gaussian)[family]
    x = gaussian.draw(2)
    got = log_likelihood(
        gaussian.denoiser(schedule),
        x,
        schedule,
        basis=gaussian.basis,
        prior=Prior(gaussian.component_mean.view(shape), covariance=gaussian.component_covariance),
    )
    want = gaussian.analytic(x, schedule)
    assert (bits_per_dim(got, gaussian.size) - bits_per_dim(want, gaussian.size)).abs().max() < 1e-3


def iid(size: int = 3) -> tuple[torch.Tensor, Schedule]:
    """Unit normals, for which N(0, 1) at t = 1 is exact, and E[c | x_t] = signal x_t."""
    return torch.randn(4, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64), Together(
        (), LogLinear()
    )


def unit_denoise(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(expand_to(log_snr, x)).sqrt() * x


def test_defaults_are_exact_for_unit_normals():
    x, schedule = iid()
    noise = math.exp(-9.2)
    want = torch.distributions.Normal(0, math.sqrt(1 + noise)).log_prob(x).sum(1)
    got = log_likelihood(unit_denoise, x, schedule)
    assert got.shape == (4,)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(log_likelihood(unit_denoise, x.float(), schedule), want.float(), atol=1e-3)
    assert log_likelihood(unit_denoise, x.float(), schedule).dtype == torch.float32


def test_prior_of_noise_alone_is_off_by_its_own_ratio():
    x, schedule = iid(1)
    # The flow leaves unit normals where they are, up to s(0).
    noise = torch.sigmoid(torch.tensor(4.6, dtype=torch.float64))
    end = x[:, 0] * torch.sigmoid(torch.tensor(9.2, dtype=torch.float64)).sqrt()
    ratio = torch.distributions.Normal(0, noise.sqrt()).log_prob(end) - torch.distributions.Normal(0, 1).log_prob(end)
    got = log_likelihood(unit_denoise, x, schedule, prior=Prior(variance=0.0)) - log_likelihood(
        unit_denoise, x, schedule
    )
    assert torch.allclose(got, ratio.double(), atol=1e-5)


def test_prior_from_component_moments_serves_independent_components():
    deviation, mean = torch.tensor([0.3, 1.0, 2.0]).double(), torch.tensor([1.0, -1.0, 0.5]).double()
    schedule = Together((), LogLinear(), scaling="flow")

    def denoise(x, log_snr):
        signal, noise = (expand_to(v, x) for v in scales_of(log_snr, "flow"))
        gain = signal * deviation**2 / ((signal * deviation) ** 2 + noise**2)
        return mean + gain * (x - signal * mean)

    data = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * deviation + mean
    moments = component_moments(Identity((3,)), data)
    got = log_likelihood(denoise, data[:4], schedule, prior=Prior(*moments))
    smoothed = (deviation**2 + math.exp(-9.2)).sqrt()
    want = torch.distributions.Normal(mean, smoothed).log_prob(data[:4]).sum(1)
    assert torch.allclose(got, want, atol=2e-3)


def test_one_level_for_all_does_not_depend_on_an_orthonormal_basis():
    gaussian = Gaussian(IMAGE)
    schedule = Together((), LogLinear())
    x = gaussian.draw(2)
    plain = log_likelihood(gaussian.denoiser(schedule), x, schedule)
    basis = DCT(IMAGE)
    in_pixels = gaussian.denoiser(schedule)

    def denoise(c, log_snr):
        return basis.forward(in_pixels(basis.inverse(c), log_snr))

    assert torch.allclose(log_likelihood(denoise, x, schedule, basis=basis), plain, atol=1e-4)


def test_value_without_smoothing_is_reached_at_high_log_snr():
    gaussian = Gaussian(SERIES)
    schedule = Together((), LogLinear(14.0, -14.0))
    x = gaussian.draw(2)
    got = log_likelihood(gaussian.denoiser(schedule), x, schedule)  # default prior: the signal is gone at t = 1
    want = gaussian.analytic(x, schedule, smoothed=False)
    assert (bits_per_dim(got, 4) - bits_per_dim(want, 4)).abs().max() < 1e-3


def test_rademacher_is_exact_where_the_jacobian_is_diagonal():
    x, schedule = iid()
    exact = log_likelihood(unit_denoise, x, schedule)
    assert torch.allclose(log_likelihood(unit_denoise, x, schedule, divergence="rademacher"), exact, atol=1e-5)


def test_rademacher_is_unbiased():
    gaussian = Gaussian(SERIES)
    schedule = Together((), LogLinear())
    denoise = gaussian.denoiser(schedule)
    x = gaussian.draw(1)
    exact = log_likelihood(denoise, x, schedule)
    many = log_likelihood(denoise, x.expand(400, 4, 1), schedule, divergence="rademacher", seed=3)
    assert many.std() > 0
    assert abs(many.mean() - exact) < 4 * many.std() / 20
    fewer = log_likelihood(denoise, x.expand(100, 4, 1), schedule, divergence="rademacher", probes=4, seed=4)
    assert abs(fewer.mean() - exact) < 4 * fewer.std() / 10
    assert fewer.std() < 0.75 * many.std()
    assert torch.equal(many, log_likelihood(denoise, x.expand(400, 4, 1), schedule, divergence="rademacher", seed=3))


def recipe(gaussian: Gaussian, x: torch.Tensor, schedule: Schedule, sign: float, probe: str) -> torch.Tensor:
    """log p by midpoint steps from data to noise, with the divergence's sign and probe to choose.

    "unit": z uniform on the unit sphere and no factor N, averaged over draws: E z z^T = I / N.
    """
    denoise, steps = gaussian.denoiser(schedule), 300
    generator = torch.Generator().manual_seed(0)
    zero = torch.zeros(1, dtype=torch.float64)

    def velocity(v: torch.Tensor, t: float) -> torch.Tensor:
        log_snr, slope = schedule.log_snr(zero + t), schedule.log_snr_slope(zero + t)
        s = torch.sigmoid(log_snr).sqrt()
        return 0.5 * slope * (s * denoise(v, log_snr.expand(v.shape[0], *log_snr.shape[1:])) - s**2 * v)

    size = gaussian.size
    if probe == "unit":
        z = torch.randn(64, size, generator=generator, dtype=torch.float64)
        z = z / z.norm(dim=1, keepdim=True)
        weight = 1 / 64
    else:
        z, weight = torch.eye(size, dtype=torch.float64), 1.0
    y = torch.sigmoid(schedule.log_snr(zero)).sqrt() * x
    total = torch.zeros(x.shape[0], dtype=torch.float64)
    for k in range(steps):
        t = k / steps
        middle = y + 0.5 / steps * velocity(y, t)
        # The velocity is affine, so a difference is the product with its Jacobian.
        moved = velocity(middle[:, None].add(z.view(1, -1, *x.shape[1:])).flatten(0, 1), t + 0.5 / steps)
        still = velocity(middle, t + 0.5 / steps)
        products = (moved.unflatten(0, (x.shape[0], -1)) - still[:, None]).flatten(2)
        total += sign * weight / steps * (products * z).sum((1, 2))
        y = y + still / steps
    prior = torch.distributions.Normal(0, 1).log_prob(y).flatten(1).sum(1)
    return prior + total + 0.5 * size * torch.nn.functional.logsigmoid(schedule.log_snr(zero)).squeeze()


def test_both_errors_of_the_reference_are_far_off_and_ours_is_right():
    """N = 20, as in the note on the reference code: exact 4.43 nats, right recipe 4.44, theirs 29.6 (other data)."""
    gaussian = Gaussian((20, 1))
    gaussian.mean *= 0
    gaussian.component_mean *= 0
    schedule = Together((), LogLinear(9.2, -9.2))
    x = gaussian.draw(2)
    want = gaussian.analytic(x, schedule)
    ours = log_likelihood(gaussian.denoiser(schedule), x, schedule)
    assert (ours - want).abs().max() < 0.05
    assert (recipe(gaussian, x, schedule, 1.0, "all") - want).abs().max() < 0.2
    for sign, probe in ((-1.0, "all"), (1.0, "unit"), (-1.0, "unit")):
        assert (recipe(gaussian, x, schedule, sign, probe) - want).abs().min() > 4, (sign, probe)
    probes = log_likelihood(gaussian.denoiser(schedule), x, schedule, divergence="rademacher", probes=64)
    assert (probes - want).abs().max() < 3


def test_bound_lies_below_the_generative_models_likelihood_by_the_kl_of_its_encoder():
    """One normal number: everything is known. p(c) = N(m, K^2 Var(x0) + v), posterior of x0 given c by Bayes."""
    gaussian = Gaussian((1,))
    schedule = Together((), LogLinear(2.0, -9.0))
    variance, m = gaussian.covariance.item(), gaussian.mean.item()
    level = torch.tensor(2.0, dtype=torch.float64)
    s, n, v = torch.sigmoid(level).sqrt(), torch.sigmoid(-level).sqrt(), torch.exp(-level)
    gain = s * variance / (s**2 * variance + n**2)
    x0 = torch.distributions.Normal(s * m, (s**2 * variance + n**2).sqrt())
    x = gaussian.draw(1)
    model = torch.distributions.Normal(m, (gain**2 * x0.variance + v).sqrt())
    precision = 1 / x0.variance + gain**2 / v
    centre = (x0.mean / x0.variance + gain * (x[0, 0] - m + gain * x0.mean) / v) / precision
    posterior = torch.distributions.Normal(centre, precision**-0.5)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(s * x[0, 0], n), posterior)
    draws = log_likelihood(gaussian.denoiser(schedule), x.expand(4000, 1), schedule, data_end="bound", seed=1)
    assert kl > 0.05
    assert abs(draws.mean() - (model.log_prob(x[0, 0]) - kl)) < 4 * draws.std() / math.sqrt(4000)


def test_bound_at_high_log_snr_is_the_density_without_smoothing():
    gaussian = Gaussian(SERIES, "dct")
    schedule = Staggered(4, 3.0, LogLinear(9.2, -9.2))
    x = gaussian.draw(1)
    draws = log_likelihood(
        gaussian.denoiser(schedule), x.expand(64, 4, 1), schedule, basis=gaussian.basis, data_end="bound",
        prior=Prior(gaussian.component_mean.view(SERIES), covariance=gaussian.component_covariance),
    )  # fmt: skip
    want = gaussian.analytic(x, schedule, smoothed=False)
    assert abs(bits_per_dim(draws.mean(), 4) - bits_per_dim(want, 4)) < 1e-3 + 4 * bits_per_dim(draws, 4).std() / 8


def test_whitening_and_scaling_enter_through_their_determinants():
    gaussian = Gaussian(SERIES)
    schedule = Together((), LogLinear(14.0, -14.0))
    raw = gaussian.draw(500)
    basis = PCA.fit(raw)
    x = raw[:2]
    truth = torch.distributions.MultivariateNormal(raw.flatten(1).mean(0), raw.flatten(1).T.cov())
    # Whitened by their own moments the components are unit normals.
    got = log_likelihood(unit_denoise, x, schedule, basis=basis)
    assert torch.allclose(got, truth.log_prob(x.flatten(1)), atol=1e-3)
    deviation = torch.tensor([0.5, 2.0, 3.0, 1.5]).double().view(4, 1)
    scaled = log_likelihood(unit_denoise, x / deviation, schedule)
    normal = torch.distributions.Normal(0, deviation).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(scaled + standardise_log_det(deviation, SERIES), normal, atol=1e-3)


def test_uniform_bytes_take_eight_bits():
    values = torch.randint(0, 256, (5, 3, 2, 2))
    x = dequantise(values, 256, seed=1, dtype=torch.float64)
    assert x.min() >= -1
    assert x.max() < 1
    assert torch.equal(((x + 1) * 128).floor().long(), values)
    uniform = torch.full((5,), -12 * math.log(2), dtype=torch.float64)
    assert torch.allclose(bits_per_dim(uniform, 12, dequantise_log_det(256, 12)), torch.full((5,), 8.0).double())
    assert not torch.equal(x, dequantise(values, 256, seed=2, dtype=torch.float64))
    spread = dequantise(torch.zeros(4000), 17, dtype=torch.float64)
    assert spread.mean() == pytest.approx(1 / 17 - 1, abs=0.004)


def test_dequantised_normal_is_bounded_by_the_entropy_of_its_integers():
    """floor of N(8, 2^2): the bound through the continuous density lies above the entropy, here within 0.01 bits."""
    normal = torch.distributions.Normal(8.0, 2.0)
    edges = torch.arange(18, dtype=torch.float64)
    mass = normal.cdf(edges[1:]) - normal.cdf(edges[:-1])
    entropy = -(mass * mass.log2()).sum()
    values = torch.multinomial(mass, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    x = dequantise(values[:, None], 17, seed=1, dtype=torch.float64)
    density = normal.log_prob((x + 1) * 8.5).squeeze(1) + math.log(8.5)
    bits = bits_per_dim(density, 1, dequantise_log_det(17, 1)).mean()
    assert entropy - 0.02 < bits < entropy + 0.03


class Recorder(Staggered):
    """Remembers the times at which its slope was asked for."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[float] = []

    def log_snr_slope(self, t):
        self.asked += t.tolist()
        return super().log_snr_slope(t)


def test_slopes_are_never_taken_at_a_kink_and_resting_pieces_cost_nothing():
    schedule = Recorder(2, 0.5)
    log_likelihood(unit_denoise, torch.zeros(1, 2, dtype=torch.float64), schedule)
    kinks = schedule.breakpoints().tolist()
    assert all(abs(t - kink) > 1e-11 for t in schedule.asked for kink in kinks)
    assert not any(1 / 3 + 1e-6 < t < 2 / 3 - 1e-6 for t in schedule.asked)
    assert schedule.asked


X = torch.zeros(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: log_likelihood(unit_denoise, X, s, divergence="hutchinson"), ValueError, "divergence: must be"),
        (lambda s: log_likelihood(unit_denoise, X, s, data_end="none"), ValueError, "data_end: must be"),
        (lambda s: log_likelihood(unit_denoise, X, s, probes=0), ValueError, "probes: must be at least 1, got 0"),
        (lambda s: log_likelihood(unit_denoise, X.half(), s), TypeError, "x: must be float32 or float64"),
        (lambda s: log_likelihood(unit_denoise, X[0], s), ValueError, "x: must be a batch"),
        (lambda s: log_likelihood(unit_denoise, X / 0, s), ValueError, "x: must be finite"),
        (lambda s: log_likelihood(unit_denoise, X, s, basis=DCT((4,))), ValueError, "x: must have shape"),
        (lambda s: log_likelihood(unit_denoise, X, Staggered(4, 2.0)), ValueError, "x: must have shape"),
        (lambda s: log_likelihood(lambda x, _: x[:, :1], X, s), ValueError, "denoise: must return the shape of x"),
        (
            lambda s: log_likelihood(unit_denoise, X, s, prior=Prior(variance=-1.0)),
            ValueError,
            "prior.variance: must be >= 0",
        ),
        (
            lambda s: log_likelihood(unit_denoise, X, s, prior=Prior(covariance=X)),
            ValueError,
            "prior.covariance: must be",
        ),
        (lambda s: bits_per_dim(X, 0), ValueError, "dims: must be at least 1"),
        (lambda s: dequantise(torch.tensor([256])), ValueError, "values: must be in 0 .. levels - 1 = 255, got 256"),
        (lambda s: dequantise(torch.tensor([0.5])), ValueError, "values: must be integers"),
        (lambda s: dequantise(torch.tensor([0]), 1), ValueError, "levels: must be at least 2"),
        (lambda s: standardise_log_det(torch.tensor([0.0]), (1,)), ValueError, "deviation: must be positive"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message.replace(".", r"\.")):
        call(Together((), LogLinear()))
