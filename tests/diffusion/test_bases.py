"""Orthonormal bases: exact inverses, isometry, agreement with scipy, torch.fft and scikit-learn, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.fft
import torch
from sae_diffusion.diffusion.bases import (
    DCT,
    PCA,
    VARIANCE_FLOOR,
    Fourier,
    Haar,
    Identity,
    basis_from,
    component_moments,
    component_variances,
    make_basis,
    variance_ordering,
)
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA as SklearnPCA

CASES = [
    (name, shape)
    for name in ("identity", "dct", "fourier", "haar", "pca")
    for shape in ((12,), (7, 1), (16, 2), (3, 8, 12), (1, 5, 6), (2, 3, 4, 8))
    if not (name == "haar" and any(n % 2 for n in shape[-2:]) and shape != (16, 2) and shape != (12,))
]
IDS = [f"{name}-{'x'.join(map(str, shape))}" for name, shape in CASES]
FP64_ROUNDING = 100 * torch.finfo(torch.float64).eps


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(name: str, shape: tuple[int, ...], **options):
    return make_basis(name, shape, data=normals(300, *shape, seed=9) * 3 + 1 if name == "pca" else None, **options)


def matrix_of(basis) -> torch.Tensor:
    """(D, D), the columns being the images of the unit vectors."""
    units = torch.eye(basis.size, dtype=torch.float64).view(-1, *basis.shape)
    zero = basis.forward(torch.zeros(1, *basis.shape, dtype=torch.float64))
    return (basis.forward(units) - zero).flatten(1).T


@pytest.mark.parametrize(("name", "shape"), CASES, ids=IDS)
def test_inverse_undoes_forward_and_back(name, shape):
    basis = make(name, shape)
    x = normals(2, 3, *shape)
    components = basis.forward(x)
    assert components.shape == x.shape
    scale = x.abs().max() * 10
    assert (basis.inverse(components) - x).abs().max() <= FP64_ROUNDING * scale
    assert (basis.forward(basis.inverse(x)) - x).abs().max() <= FP64_ROUNDING * scale


@pytest.mark.parametrize(("name", "shape"), CASES, ids=IDS)
def test_matrix_is_orthonormal_to_rounding(name, shape):
    basis = make(name, shape, whiten=False) if name == "pca" else make(name, shape)
    matrix = matrix_of(basis)
    rounding = max(
        FP64_ROUNDING, basis.size * torch.finfo(torch.float64).eps
    )  # LAPACK's bound of eigh has the factor D
    assert (matrix @ matrix.T - torch.eye(basis.size, dtype=torch.float64)).abs().max() <= rounding
    assert basis.log_det == 0


@pytest.mark.parametrize(("name", "shape"), CASES, ids=IDS)
def test_log_det_is_that_of_the_matrix(name, shape):
    basis = make(name, shape)
    assert basis.log_det == pytest.approx(torch.linalg.slogdet(matrix_of(basis))[1].item(), abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["identity", "dct", "fourier", "haar", "pca"])
def test_other_dtypes_are_kept_and_no_worse_than_their_rounding(name, dtype):
    basis, x = make(name, (2, 4, 8)), normals(3, 2, 4, 8, dtype=dtype)
    for transform in (basis.forward, basis.inverse):
        out, exact = transform(x), transform(x.double())
        assert out.dtype == dtype
        assert (out.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["identity", "dct", "fourier", "haar", "pca"])
def test_gradient_is_the_transpose(name):
    basis = make(name, (2, 2, 4))
    x = normals(2, 2, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(basis.forward, (x,))
    assert torch.autograd.gradcheck(basis.inverse, (x,))
    one = basis.forward(torch.func.vmap(lambda v: basis.inverse(v))(x.detach()))
    assert torch.allclose(one, x.detach(), atol=1e-12)


@pytest.mark.parametrize("name", ["dct", "fourier", "haar"])
def test_white_noise_stays_white(name):
    """Covariance of transformed normals: 20 000 draws, each entry within 5 standard errors of the identity's."""
    basis, draws = make(name, (1, 4, 4)), 20_000
    components = basis.forward(normals(draws, 1, 4, 4, seed=3)).flatten(1)
    covariance = components.T @ components / draws
    error = torch.sqrt((1 + torch.eye(16, dtype=torch.float64)) / draws)
    assert ((covariance - torch.eye(16, dtype=torch.float64)).abs() <= 5 * error).all()


@pytest.mark.parametrize("shape", [(9,), (8, 3), (2, 6, 5)])
def test_dct_is_scipys(shape):
    x = normals(2, *shape)
    axes = (1,) if len(shape) < 3 else (2, 3)
    want = scipy.fft.dctn(x.numpy(), type=2, norm="ortho", axes=axes)
    assert np.abs(DCT(shape).forward(x).numpy() - want).max() <= 1e-13


def test_dct_of_a_long_series_keeps_its_accuracy():
    x = normals(1, 1024)
    want = scipy.fft.dct(x.numpy(), type=2, norm="ortho")
    assert np.abs(DCT((1024,)).forward(x).numpy() - want).max() <= 5e-14  # 3e-13 with unreduced phases


@pytest.mark.parametrize(("shape", "dims"), [((9,), (-1,)), ((8,), (-1,)), ((8, 3), (-2,)), ((2, 6, 5), (-2, -1))])
def test_fourier_holds_the_spectrum_of_torch_fft(shape, dims):
    basis, x = Fourier(shape), normals(3, *shape)
    spectrum = torch.fft.fftn(x, dim=dims, norm="ortho")
    assert torch.allclose(basis.to_spectrum(basis.forward(x)), spectrum, atol=1e-13)
    assert torch.allclose(basis.from_spectrum(spectrum), basis.forward(x), atol=1e-13)


@pytest.mark.parametrize("shape", [(7,), (8,), (2, 4, 6)])
def test_noise_drawn_in_fourier_components_is_hermitian_and_of_the_right_variance(shape):
    basis = Fourier(shape)
    noise = normals(4000, *shape)
    spectrum = basis.to_spectrum(noise)
    assert torch.allclose(spectrum, basis._negate(spectrum).conj())
    power = spectrum.abs().square().mean(0)
    assert torch.allclose(power, torch.ones_like(power), atol=0.15)
    own = spectrum[:, basis._own]
    assert own.imag.abs().max() == 0
    assert torch.allclose(own.real.var(0), torch.ones_like(own.real[0]), atol=0.15)
    pixels = basis.inverse(noise).flatten(1)
    assert torch.allclose(pixels.T @ pixels / 4000, torch.eye(basis.size, dtype=torch.float64), atol=0.1)


def test_haar_of_one_level_is_sums_and_differences_of_pairs():
    x = normals(1, 6)
    low, high = (x[:, 0::2] + x[:, 1::2]) / 2**0.5, (x[:, 0::2] - x[:, 1::2]) / 2**0.5
    assert torch.allclose(Haar((6,), levels=1).forward(x), torch.cat([low, high], dim=1), atol=1e-15)


def test_haar_low_pass_of_images_is_the_scaled_mean_of_squares():
    x = normals(2, 3, 8, 12)
    want = torch.nn.functional.avg_pool2d(x, 4) * 4
    assert torch.allclose(Haar((3, 8, 12), levels=2).forward(x)[..., :2, :3], want, atol=1e-14)


def test_haar_over_time_mixes_nothing_else():
    basis, x = Haar((4, 2, 3, 5), time=True), normals(2, 4, 2, 3, 5)
    series = Haar((4,))
    want = series.forward(x.movedim(1, -1)).movedim(-1, 1)
    assert torch.allclose(basis.forward(x), want, atol=1e-14)
    assert torch.allclose(Haar((4, 7)).forward(normals(1, 4, 7))[..., 0], series.forward(normals(1, 4, 7)[..., 0]))


def test_haar_levels_default_to_all_that_divide():
    assert Haar((24,)).levels == 3
    assert Haar((3, 8, 12)).levels == 2


@pytest.mark.parametrize("whiten", [False, True])
def test_pca_is_sklearns_up_to_sign(whiten):
    mixing = normals(6, 6, seed=1)
    data = (normals(200, 6, seed=2) @ mixing + 5).view(200, 1, 2, 3)
    basis = PCA.fit(data, whiten=whiten)
    theirs = SklearnPCA(whiten=whiten).fit(data.flatten(1).numpy())
    assert np.allclose(basis.variances.numpy(), theirs.explained_variance_, rtol=1e-10)
    want = torch.from_numpy(theirs.transform(data.flatten(1).numpy()))
    got = basis.forward(data).flatten(1)
    sign = torch.from_numpy(np.sign((theirs.components_ * basis.directions.numpy()).sum(1)))
    assert torch.allclose(got, want * sign, atol=1e-9)
    largest = basis.directions.gather(1, basis.directions.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_whitened_data_have_unit_covariance_and_no_mean():
    data = normals(500, 5, seed=1) @ normals(5, 5, seed=2) - 3
    components = PCA.fit(data).forward(data)
    assert torch.allclose(components.T.cov(), torch.eye(5, dtype=torch.float64), atol=1e-10)
    assert components.mean(0).abs().max() <= 1e-12


def test_rank_deficient_data_are_whitened_at_the_floor():
    flat = normals(100, 3, seed=1) @ normals(3, 5, seed=2)
    basis = PCA.fit(flat)
    assert basis.rank == 3
    floor = VARIANCE_FLOOR * basis.variances[0].item()
    assert torch.allclose(basis.deviations[3:] ** 2, torch.full((2,), floor, dtype=torch.float64))
    assert basis.log_det == pytest.approx(
        -0.5 * torch.cat([basis.variances[:3], basis.deviations[3:] ** 2]).log().sum()
    )
    x = normals(4, 5)
    assert torch.allclose(basis.inverse(basis.forward(x)), x, atol=1e-8)
    assert component_variances(basis, flat)[3:].max() <= 1e-9
    with pytest.raises(ValueError, match="data: must vary"):
        PCA.fit(torch.ones(5, 3))


def test_moments_are_those_of_the_components(monkeypatch):
    monkeypatch.setattr("sae_diffusion.diffusion.bases._CHUNK", 7)
    data = normals(50, 2, 4, 4) + 2
    basis = DCT((2, 4, 4))
    mean, variance = component_moments(basis, data)
    components = basis.forward(data)
    assert torch.allclose(mean, components.mean(0))
    assert torch.allclose(variance, components.var(0))
    assert torch.equal(component_variances(basis, data), variance)
    chunked = PCA.fit(data)
    monkeypatch.undo()
    assert torch.allclose(chunked.variances, PCA.fit(data).variances, atol=1e-12)


def test_orderings_rise_from_coarse_to_fine():
    assert torch.equal(DCT((4,)).ordering(), torch.tensor([0, 1, 2, 3]) / 8.0)
    assert torch.equal(Fourier((4,)).ordering(), torch.tensor([0, 0.25, 0.5, 0.25], dtype=torch.float64))
    assert Fourier((1, 4, 4)).ordering()[0, 1, 2] == pytest.approx((0.25**2 + 0.5**2) ** 0.5)
    assert DCT((2, 4, 6)).ordering()[1, 3, 2] == pytest.approx(((3 / 8) ** 2 + (2 / 12) ** 2) ** 0.5)
    assert Haar((8,)).ordering().tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert Haar((1, 4, 4)).ordering()[0].tolist() == [[0, 1, 2, 2], [1, 1, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2]]
    assert Identity((3, 2)).ordering().tolist() == [[0, 0], [0.5, 0.5], [1, 1]]
    assert Identity((1, 2, 3)).ordering()[0].tolist() == [[0, 0.5, 1], [0, 0.5, 1]]
    pca = make("pca", (2, 3))
    assert torch.allclose(pca.ordering().flatten(), -pca.variances.log())
    assert (pca.ordering().flatten().diff() >= 0).all()
    assert variance_ordering(torch.tensor([1.0, 0.0]))[1] == pytest.approx(-np.log(VARIANCE_FLOOR), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [("dct", {"axes": (1,)}), ("haar", {"levels": 1}), ("fourier", {}), ("identity", {}), ("pca", {"whiten": False})],
)
def test_basis_survives_json_and_safetensors(name, options, tmp_path):
    basis = make(name, (2, 4, 4), **options)
    save_file(basis.tensors() or {"none": torch.zeros(1)}, tmp_path / "basis.safetensors")
    again = basis_from(json.loads(json.dumps(basis.description())), load_file(tmp_path / "basis.safetensors"))
    x = normals(2, 2, 4, 4)
    assert type(again) is type(basis)
    assert torch.equal(again.forward(x), basis.forward(x))
    assert again.log_det == basis.log_det


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DCT((4, 4, 4)).forward(torch.zeros(2, 4, 4, 5)), r"x: must have shape \(\.\.\., 4, 4, 4\), got"),
        (lambda: DCT((8,)).inverse(torch.zeros(7)), r"components: must have shape \(\.\.\., 8\), got \(7,\)"),
        (lambda: make("pca", (3,)).forward(torch.zeros(4)), r"x: must have shape"),
        (lambda: Fourier((2, 3)).forward(torch.zeros(3)), r"x: must have shape"),
        (lambda: Haar((7,)), r"levels: every transformed size must be divisible by 2 for 1 level\(s\), got \[7\]"),
        (lambda: Haar((1, 8, 12), levels=3), r"levels: .* divisible by 8 for 3 level\(s\), got \[8, 12\]"),
        (lambda: Haar((8,), levels=0), "levels:"),
        (lambda: DCT((4, 4), axes=(2,)), "axes: must be axes of a sample, 0 to 1"),
        (lambda: DCT(()), "shape: must be"),
        (lambda: make_basis("dft", (4,)), "name: must be one of .* got 'dft'"),
        (lambda: make_basis("pca", (4,)), "data: must be the data to fit a PCA basis to"),
        (lambda: make_basis("pca", (4,), torch.zeros(9, 5)), r"data: must be \(M, 4\), got \(9, 5\)"),
        (lambda: PCA.fit(torch.zeros(1, 5)), "data: must be .* M >= 2"),
        (lambda: PCA.fit(torch.tensor([[1.0], [float("nan")]])), "data: must be finite"),
        (lambda: component_moments(DCT((4,)), torch.zeros(1, 4)), "data: must hold at least 2 samples"),
        (lambda: PCA((2,), torch.zeros(3), torch.eye(2), torch.ones(2), True), r"mean: must have shape \(2,\)"),
    ],
)
def test_wrong_sizes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_are_refused_by_name():
    with pytest.raises(TypeError, match=r"x: must be floating-point, got torch\.int64"):
        DCT((4,)).forward(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="data: must be floating-point"):
        PCA.fit(torch.zeros(4, 2, dtype=torch.int64))
