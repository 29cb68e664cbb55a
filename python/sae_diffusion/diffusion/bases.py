"""Orthonormal bases in which diffusion and its schedule act: identity, DCT, real Fourier, Haar, PCA.

A basis maps data (..., *shape) to the same number of real components (..., *shape). Shapes are (N,) or (N, C) for
series, (C, Y, X) for images and (T, C, Y, X) for videos; a transform works over the first axis of a series and over
Y, X otherwise.
Every basis except a whitened PCA is orthonormal, so white noise in the data is white noise in the components, and noise
can be drawn in either. Half-precision data is transformed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice

# Variances below this fraction of the largest are raised to it by a whitening PCA.
VARIANCE_FLOOR = 1e-6
_CHUNK = 4096


class Basis:
    """An invertible linear (PCA: affine) change of coordinates.

    Attributes:
        name: the name used by `make_basis`.
        shape: of one sample, and of its components.
        log_det: log |det d components / d data|; 0 for an orthonormal basis.
    """

    name = ""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(int(n) for n in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape: must be one or more positive sizes, got {tuple(shape)}")
        self.log_det = 0.0
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def size(self) -> int:
        """Components of a sample."""
        return math.prod(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Data (..., *shape) -> components (..., *shape), differentiable, in the dtype of x.

        Raises:
            ValueError: x does not end in `shape`.
            TypeError: x is not floating-point.
        """
        return self._apply(self._forward, x, "x")

    def inverse(self, components: Tensor) -> Tensor:
        """Components (..., *shape) -> data (..., *shape); raises as `forward` does."""
        return self._apply(self._inverse, components, "components")

    def ordering(self) -> Tensor:
        """fp64 `shape`: from coarse (small) to fine (large), the order of generation of `ComponentLinear`."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What was fitted, as contiguous fp64 tensors; empty for a fixed transform."""
        return {}

    def description(self) -> dict[str, Any]:
        """A JSON value that, with `tensors`, rebuilds the basis, see `basis_from`."""
        return {"name": self.name, "shape": list(self.shape)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.description().items() if k != 'name')})"

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _inverse(self, c: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply(self, transform: Any, x: Tensor, name: str) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"{name}: must be floating-point, got {x.dtype}")
        if x.ndim < len(self.shape) or tuple(x.shape[x.ndim - len(self.shape) :]) != self.shape:
            raise ValueError(f"{name}: must have shape (..., {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        compute = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        return transform(x.to(compute)).to(x.dtype)

    def _place(self, key: str, tensor: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A constant on the device of `like` and in its dtype, copied once."""
        where = (key, like.device, dtype or like.dtype)
        if where not in self._placed:
            self._placed[where] = tensor.to(device=where[1], dtype=where[2])
        return self._placed[where]


class _Separable(Basis):
    """A transform over some axes of the sample."""

    def __init__(self, shape: Sequence[int], axes: Sequence[int] | None = None) -> None:
        super().__init__(shape)
        dims = len(self.shape)
        default = (0,) if dims < 3 else (dims - 2, dims - 1)
        self.axes = default if axes is None else tuple(sorted({int(a) for a in axes}))
        if not self.axes or self.axes[0] < 0 or self.axes[-1] >= dims:
            raise ValueError(f"axes: must be axes of a sample, 0 to {dims - 1}, got {axes}")
        # counted from the end, because any number of dimensions may come before the sample's
        self.dims = tuple(a - dims for a in self.axes)

    def description(self) -> dict[str, Any]:
        return {**super().description(), "axes": list(self.axes)}

    def _along(self, axis: int, values: Tensor) -> Tensor:
        """Values (n,) of one axis, shaped to broadcast over a sample."""
        return values.view([-1 if a == axis else 1 for a in range(len(self.shape))])

    def _radius(self, frequencies: Mapping[int, Tensor]) -> Tensor:
        """Euclidean norm of the frequencies of all axes."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for axis, f in frequencies.items():
            total = total + self._along(axis, f).square()
        return total.sqrt()


class Identity(_Separable):
    """The components are the data; its order is position in time, or the column of an image."""

    name = "identity"

    def _forward(self, x: Tensor) -> Tensor:
        return x

    def _inverse(self, c: Tensor) -> Tensor:
        return c

    def ordering(self) -> Tensor:
        axis = self.axes[-1]
        position = torch.arange(self.shape[axis], dtype=torch.float64) / max(self.shape[axis] - 1, 1)
        return self._along(axis, position).expand(self.shape).clone()


class DCT(_Separable):
    """The orthonormal DCT-II of each axis; component k has frequency k / 2n cycles per sample.

    A product with an n x n matrix: invertible up to rounding, and fast enough up to a few thousand samples.
    """

    name = "dct"

    def __init__(self, shape: Sequence[int], axes: Sequence[int] | None = None) -> None:
        super().__init__(shape, axes)
        self._matrices = {n: _dct_matrix(n) for n in {self.shape[a] for a in self.axes}}

    def _forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, transpose=False)

    def _inverse(self, c: Tensor) -> Tensor:
        return self._multiply(c, transpose=True)

    def _multiply(self, x: Tensor, transpose: bool) -> Tensor:
        for dim in self.dims:
            n = x.shape[dim]
            matrix = self._place(str(n), self._matrices[n], x)
            x = (x.movedim(dim, -1) @ (matrix if transpose else matrix.T)).movedim(-1, dim)
        return x

    def ordering(self) -> Tensor:
        n = self.shape
        return self._radius({a: torch.arange(n[a], dtype=torch.float64) / (2 * n[a]) for a in self.axes})


def _dct_matrix(n: int) -> Tensor:
    """M[k, i] = sqrt(2 / n) cos(pi (i + 1/2) k / n), row 0 over sqrt(2)."""
    i = torch.arange(n)
    # The phase is reduced while it is an integer, because cos of a large argument suffers from its rounding.
    phase = torch.outer(i, 2 * i + 1) % (4 * n)
    matrix = torch.cos(math.pi / (2 * n) * phase.double()) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


class Fourier(_Separable):
    """The unitary discrete Fourier transform F of real data, as real components.

    Of a pair F(k), F(-k) = conj F(k), the index that comes first in memory holds sqrt(2) Re F(k) and the other one
    sqrt(2) Im F(k); an index that is its own pair holds F(k), which is real. So independent normals in the components
    are the Hermitian noise of the spectrum, and the map is orthonormal. Component k has the frequency of
    `torch.fft.fftfreq`.
    """

    name = "fourier"

    def __init__(self, shape: Sequence[int], axes: Sequence[int] | None = None) -> None:
        super().__init__(shape, axes)
        index = torch.arange(self.size).view(self.shape)
        pair = self._negate(index)
        self._own = index == pair
        self._first = index < pair

    def _negate(self, x: Tensor) -> Tensor:
        """The element at -k, for every k."""
        return x.flip(self.dims).roll((1,) * len(self.dims), self.dims)

    def _masks(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._place("own", self._own, like, torch.bool), self._place("first", self._first, like, torch.bool)

    def _forward(self, x: Tensor) -> Tensor:
        return self.from_spectrum(torch.fft.fftn(x, dim=self.dims, norm="ortho"))

    def _inverse(self, c: Tensor) -> Tensor:
        return torch.fft.ifftn(self.to_spectrum(c), dim=self.dims, norm="ortho").real

    def from_spectrum(self, spectrum: Tensor) -> Tensor:
        """A Hermitian spectrum (..., *shape), as of `torch.fft.fftn(x, norm="ortho")`, -> components."""
        re, im = spectrum.real, spectrum.imag
        own, first = self._masks(spectrum)
        return torch.where(own, re, math.sqrt(2) * torch.where(first, re, -im))

    def to_spectrum(self, components: Tensor) -> Tensor:
        """Components (..., *shape), fp32 or fp64, -> the Hermitian spectrum."""
        own, first = self._masks(components)
        other = self._negate(components)
        re = torch.where(first, components, other) / math.sqrt(2)
        im = torch.where(first, other, -components) / math.sqrt(2)
        return torch.complex(torch.where(own, components, re), torch.where(own, torch.zeros_like(im), im))

    def ordering(self) -> Tensor:
        return self._radius({a: torch.fft.fftfreq(self.shape[a], dtype=torch.float64) for a in self.axes})


class Haar(_Separable):
    """The orthonormal Haar wavelet transform, `levels` times on the low-pass part of all its axes.

    Low-pass components come first along every axis (Mallat's layout): the first n / 2^levels of each axis are the
    scaled means of squares of 2^levels samples.

    Args:
        levels: None for as many as the sizes allow.
        time: transform the first axis only, as is always done for series.

    Raises:
        ValueError: an axis is not divisible by 2^levels.
    """

    name = "haar"

    def __init__(
        self, shape: Sequence[int], levels: int | None = None, time: bool = False, axes: Sequence[int] | None = None
    ) -> None:
        super().__init__(shape, (0,) if time else axes)
        sizes = [self.shape[a] for a in self.axes]
        most = min((n & -n).bit_length() - 1 for n in sizes)
        self.levels = most if levels is None else levels
        if not 1 <= self.levels <= most:
            raise ValueError(
                f"levels: every transformed size must be divisible by {2 ** max(self.levels, 1)} for "
                f"{'1' if levels is None else levels} level(s), got {sizes}"
            )

    def description(self) -> dict[str, Any]:
        return {**super().description(), "levels": self.levels}

    def _low(self, level: int) -> tuple[Any, ...]:
        """Index of the low-pass part after `level` levels."""
        return (..., *(slice(n >> level if a in self.axes else n) for a, n in enumerate(self.shape)))

    def _forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for level in range(self.levels):
            low = self._low(level)
            part = x[low]
            for dim in self.dims:
                even, odd = part.unflatten(dim, (-1, 2)).unbind(dim)
                part = torch.cat((even + odd, even - odd), dim=dim) * math.sqrt(0.5)
            x[low] = part
        return x

    def _inverse(self, c: Tensor) -> Tensor:
        c = c.clone()
        for level in reversed(range(self.levels)):
            low = self._low(level)
            part = c[low]
            for dim in reversed(self.dims):
                sums, differences = part.chunk(2, dim=dim)
                pairs = torch.stack((sums + differences, sums - differences), dim=dim)
                part = pairs.flatten(dim - 1, dim) * math.sqrt(0.5)
            c[low] = part
        return c

    def ordering(self) -> Tensor:
        """0 for the low-pass rest, then 1 for the coarsest details up to `levels` for the finest."""
        scale = torch.full(self.shape, float(self.levels), dtype=torch.float64)
        for level in range(1, self.levels + 1):
            scale[self._low(level)] = self.levels - level
        return scale


class PCA(Basis):
    """Principal components of data in order of decreasing variance, each divided by its deviation if whitened.

    Component k is at index k of the flattened sample. When whitening, variances below `VARIANCE_FLOOR` times the
    largest, as in rank-deficient data, are raised to that floor: the map stays invertible and `log_det` finite, and
    such a component has less than unit variance. `rank` is the number of variances above the floor. Densities of
    rank-deficient data mean little: dequantise first.

    Attributes:
        mean: `shape`; subtracted from data.
        directions: (D, D), a row for each component; its largest entry is positive.
        variances: (D,) of the data along the directions.
    """

    name = "pca"

    def __init__(self, shape: Sequence[int], mean: Tensor, directions: Tensor, variances: Tensor, whiten: bool) -> None:
        super().__init__(shape)
        for name, tensor, want in (
            ("mean", mean, self.shape),
            ("directions", directions, (self.size, self.size)),
            ("variances", variances, (self.size,)),
        ):
            if tuple(tensor.shape) != want:
                raise ValueError(f"{name}: must have shape {want}, got {tuple(tensor.shape)}")
        self.mean, self.directions, self.variances = mean.double(), directions.double(), variances.double()
        self.whiten = whiten
        floor = VARIANCE_FLOOR * self.variances.max()
        self.rank = int((self.variances > floor).sum())
        if whiten and not floor > 0:
            raise ValueError("data: must vary to be whitened, got no variance")
        self.deviations = self.variances.clamp(min=floor).sqrt() if whiten else torch.ones_like(self.variances)
        self.log_det = -float(self.deviations.log().sum())

    @classmethod
    def fit(cls, data: Tensor, whiten: bool = True) -> PCA:
        """The PCA of data (M, *shape), M >= 2; covariance over M - 1, in fp64."""
        if not data.is_floating_point():
            raise TypeError(f"data: must be floating-point, got {data.dtype}")
        if data.ndim < 2 or data.shape[0] < 2:
            raise ValueError(f"data: must be (M, *shape) with M >= 2 samples, got {tuple(data.shape)}")
        if not torch.isfinite(data).all():
            raise ValueError("data: must be finite, got NaN or infinity")
        mean = _mean(data)
        scatter = torch.zeros(mean.numel(), mean.numel(), dtype=torch.float64, device=data.device)
        for chunk in _chunks(data):
            centred = (chunk - mean).flatten(1)
            scatter += centred.T @ centred
        variances, vectors = torch.linalg.eigh(scatter / (data.shape[0] - 1))
        directions = vectors.T.flip(0).contiguous()
        largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
        # eigh returns a small number of either sign for a variance of zero
        return cls(data.shape[1:], mean, directions * largest.sign(), variances.flip(0).clamp(min=0.0), whiten)

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "directions": self.directions, "variances": self.variances}

    def description(self) -> dict[str, Any]:
        return {**super().description(), "whiten": self.whiten}

    def _forward(self, x: Tensor) -> Tensor:
        centred = (x - self._place("mean", self.mean, x)).flatten(x.ndim - len(self.shape))
        c = (centred @ self._place("directions", self.directions, x).T) / self._place("scale", self.deviations, x)
        return c.view(x.shape)

    def _inverse(self, c: Tensor) -> Tensor:
        scaled = c.flatten(c.ndim - len(self.shape)) * self._place("scale", self.deviations, c)
        return (scaled @ self._place("directions", self.directions, c)).view(c.shape) + self._place(
            "mean", self.mean, c
        )

    def ordering(self) -> Tensor:
        """- log variance of the data along each direction."""
        return variance_ordering(self.variances.view(self.shape))


def variance_ordering(variances: Tensor) -> Tensor:
    """GUD's order of generation l = - log variance, variances floored at `VARIANCE_FLOOR` times the largest."""
    return -variances.clamp(min=VARIANCE_FLOOR * variances.max()).log()


def component_moments(basis: Basis, data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (over M - 1) of each component of data (M, *shape), both fp64 `shape`."""
    if data.shape[0] < 2:
        raise ValueError(f"data: must hold at least 2 samples, got {data.shape[0]}")
    components = [basis.forward(chunk) for chunk in _chunks(data)]
    mean = torch.stack([c.sum(0) for c in components]).sum(0) / data.shape[0]
    squares = torch.stack([(c - mean).square().sum(0) for c in components]).sum(0)
    return mean, squares / (data.shape[0] - 1)


def component_variances(basis: Basis, data: Tensor) -> Tensor:
    """Variance (over M - 1) of each component of data (M, *shape), fp64 `shape`."""
    return component_moments(basis, data)[1]


def make_basis(name: str, shape: Sequence[int], data: Tensor | None = None, **options: Any) -> Basis:
    """A basis by name: "identity", "dct", "fourier", "haar" (options levels, time, axes) or "pca" (data; whiten).

    Raises:
        ValueError: the name is not one of these, or for "pca" there is no data or data of another shape.
    """
    if name == PCA.name:
        if data is None:
            raise ValueError("data: must be the data to fit a PCA basis to, got None")
        if tuple(data.shape[1:]) != tuple(shape):
            raise ValueError(f"data: must be (M, {', '.join(map(str, shape))}), got {tuple(data.shape)}")
        return PCA.fit(data, **options)
    check_choice("name", name, (*_FIXED, PCA.name))
    return _FIXED[name](shape, **options)


def basis_from(description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Basis:
    """The basis that returned this `description()` and these `tensors()`."""
    options = dict(description)
    name, shape = options.pop("name"), options.pop("shape")
    if name == PCA.name:
        fitted = tensors or {}
        return PCA(shape, fitted["mean"], fitted["directions"], fitted["variances"], **options)
    return make_basis(name, shape, **options)


_FIXED: dict[str, Any] = {basis.name: basis for basis in (Identity, DCT, Fourier, Haar)}


def _chunks(data: Tensor) -> Iterator[Tensor]:
    return (data[i : i + _CHUNK].double() for i in range(0, data.shape[0], _CHUNK))


def _mean(data: Tensor) -> Tensor:
    return torch.stack([chunk.sum(0) for chunk in _chunks(data)]).sum(0) / data.shape[0]
