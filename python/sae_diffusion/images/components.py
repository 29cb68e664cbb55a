"""Whitened components: an orthonormal basis, then each component scaled to mean 0 and variance 1 on the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.bases import Basis, basis_from, component_moments, make_basis

MEAN, DEVIATION = "components.mean", "components.deviation"


class Whitened(Basis):
    """Components (U x - mean) / deviation of a basis U.

    GUD (Gerdes et al. 2024) diffuses in these coordinates: its prior N(0, I) is the noise of every component, and equal
    noise in the data is log-SNR that differs by the log variance.

    Attributes:
        base: the orthonormal basis.
        mean, deviation: fp64 `shape`.
    """

    name = "whitened"

    def __init__(self, base: Basis, mean: Tensor, deviation: Tensor) -> None:
        super().__init__(base.shape)
        for name, tensor in (("mean", mean), ("deviation", deviation)):
            if tuple(tensor.shape) != self.shape:
                raise ValueError(f"{name}: must have the shape {self.shape} of the basis, got {tuple(tensor.shape)}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: must be finite, got NaN or infinity")
        if not (deviation > 0).all():
            raise ValueError(f"deviation: must be positive, got {float(deviation.min())}")
        self.base, self.mean, self.deviation = base, mean.double(), deviation.double()
        self.log_det = base.log_det - float(self.deviation.log().sum())

    @classmethod
    def fit(cls, name: str, images: Tensor, step: float, **options: Any) -> Whitened:
        """Fit to images (N, C, Y, X) at the middle of their levels, which are `step` wide.

        Uniform dequantisation is white, so it adds exactly step^2 / 12 to the variance of every component.
        """
        shape = images.shape[1:]
        if name == "pca":
            options.setdefault("whiten", False)
        base = make_basis(name, shape, images.double() if name == "pca" else None, **options)
        mean, variance = component_moments(base, images.double())
        return cls(base, mean, (variance + step**2 / 12).sqrt())

    @property
    def variance(self) -> Tensor:
        """Variance of the components before whitening, fp64 `shape`."""
        return self.deviation.square()

    def ordering(self) -> Tensor:
        """l = - log variance, as in GUD: components of large variance are generated first."""
        return -self.variance.log()

    def tensors(self) -> dict[str, Tensor]:
        return {**self.base.tensors(), MEAN: self.mean, DEVIATION: self.deviation}

    def description(self) -> dict[str, Any]:
        return self.base.description()

    @classmethod
    def load(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Whitened:
        """From `description()` and `tensors()`."""
        own = {name: tensor for name, tensor in tensors.items() if name not in (MEAN, DEVIATION)}
        return cls(basis_from(description, own), tensors[MEAN], tensors[DEVIATION])

    def _forward(self, x: Tensor) -> Tensor:
        return (self.base.forward(x) - self._place("mean", self.mean, x)) / self._place("std", self.deviation, x)

    def _inverse(self, c: Tensor) -> Tensor:
        return self.base.inverse(c * self._place("std", self.deviation, c) + self._place("mean", self.mean, c))


def gaussian_bits_per_dim(basis: Whitened, x: Tensor, step: float) -> Tensor:
    """Bits per dimension (B,) of images x (B, C, Y, X) for independent normal components: the untrained model."""
    z = basis.forward(x.double()).flatten(1)
    log_density = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + basis.log_det
    return -log_density / (math.log(2) * basis.size) - math.log2(step)


def check_basis(name: str, shape: Sequence[int]) -> None:
    """Raise a ValueError if images of this shape cannot have this basis; reads no data."""
    if name != "pca":
        make_basis(name, shape)
