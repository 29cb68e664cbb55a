"""Bits per dimension on held-out images, and samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import Count, check_value
from ..diffusion.likelihood import bits_per_dim, dequantise, dequantise_log_det, log_likelihood
from ..diffusion.noise import derive_seed
from ..diffusion.schedules import Schedule, sampling_times
from ..diffusion.solvers import sample
from ..diffusion.solvers import start as start_noise
from .components import gaussian_bits_per_dim
from .config import EvaluateConfig
from .data import quantise
from .train import ImageModel

# purposes of derived seeds, apart from those of training
_CHOICE, _PIXELS, _PROBES, _START, _STEPS = range(100, 105)


@dataclass(frozen=True)
class Bits:
    """Bits per dimension of each image (N,) fp64, and those of independent normal components, the untrained model."""

    bits: np.ndarray
    gaussian: np.ndarray
    evaluations: int

    @property
    def mean(self) -> float:
        return float(self.bits.mean())

    @property
    def standard_error(self) -> float:
        """Standard error over images; it does not include the spread over training runs."""
        return float(self.bits.std(ddof=1) / math.sqrt(len(self.bits))) if len(self.bits) > 1 else math.nan


class _Smooth(Schedule):
    """A schedule that hides its corners from the solver: one adaptive integration instead of one per piece.

    A hundred components that stop at a hundred different times would need two hundred starts of the solver; its error
    control copes with the corners, where log-SNR is at `least` or `most` and little changes.
    """

    def __init__(self, inner: Schedule) -> None:
        self.inner, self.shape, self.scaling = inner, inner.shape, inner.scaling

    def log_snr(self, t: Tensor) -> Tensor:
        return self.inner.log_snr(t)

    def log_snr_slope(self, t: Tensor) -> Tensor:
        return self.inner.log_snr_slope(t)


def choose_images(images: np.ndarray, count: int, seed: int) -> Tensor:
    """`count` of the images (N, C, Y, X), all for 0, in an order that depends only on the seed."""
    order = np.random.default_rng(derive_seed(seed, _CHOICE)).permutation(len(images))
    return torch.from_numpy(images[order[: count or len(images)]])


def evaluate(
    model: ImageModel, images: np.ndarray, config: EvaluateConfig, callback: Callable[[float], None] | None = None
) -> Bits:
    """Bits per dimension: an upper bound for the integer pixels, by uniform dequantisation with one draw per image.

    The density is the one that the probability flow carries from the normal prior at t = 1 to the components at t = 0.
    Images are evaluated there without noise, so it is the model's own normalised density for any least noise.

    Args:
        images: uint8 (N, C, Y, X) of the model's shape.
        callback: called with the number of images done, counting part of the current batch.

    Raises:
        ValueError: images of another shape.
    """
    if tuple(images.shape[1:]) != model.basis.shape:
        raise ValueError(f"images: must be (N, {', '.join(map(str, model.basis.shape))}), got {images.shape}")
    chosen = choose_images(images, config.images, config.seed)
    x = dequantise(chosen, model.levels, seed=derive_seed(config.seed, _PIXELS), dtype=torch.float64)
    gaussian = gaussian_bits_per_dim(model.basis, x, model.level_width)
    bits, evaluations = [], 0

    def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return model.denoise(z, log_snr)

    dims = model.basis.size
    for number, batch in enumerate(x.to(model.device).split(config.batch_size)):

        def report(t: float, done: int = number * config.batch_size, size: int = len(batch)) -> None:
            if callback is not None:
                callback(done + t * size)

        log_density = log_likelihood(
            denoise, batch, _Smooth(model.schedule), basis=model.basis, divergence=config.divergence,
            probes=config.probes, seed=derive_seed(config.seed, _PROBES, number), tolerance=config.tolerance,
            callback=report,
        )  # fmt: skip
        bits.append(bits_per_dim(log_density, dims, dequantise_log_det(model.levels, dims)))
    return Bits(torch.cat(bits).cpu().numpy(), gaussian.numpy(), evaluations)


@torch.no_grad()
def sample_images(
    model: ImageModel,
    count: int,
    *,
    steps: int = 64,
    solver: str = "ddim",
    seed: int = 0,
    start: Tensor | None = None,
    callback: Callable[[int], None] | None = None,
) -> np.ndarray:
    """uint8 images (count, C, Y, X).

    Args:
        steps: of equal length in t; components one after another need more of them than all together.
        solver: of `diffusion.solvers.sample`.
        start: components at t = 1 (count, C, Y, X); standard normals of the seed by default.
        callback: called with the number of steps done.

    Raises:
        ValueError: count below 1.
    """
    check_value("count", count, Count)
    if start is None:
        shape = (count, *model.basis.shape)
        start = start_noise(shape, model.schedule, seed=derive_seed(seed, _START), device=model.device)
    times = sampling_times(model.schedule, steps)

    def report(i: int, *_: object) -> None:
        if callback is not None:
            callback(i + 1)

    z = sample(
        model.denoise, start, model.schedule, times, solver=solver, seed=derive_seed(seed, _STEPS), callback=report
    )
    return quantise(model.basis.inverse(z), model.levels).cpu().numpy()


def contact_sheet(images: np.ndarray, levels: int, columns: int = 16, scale: int = 4) -> np.ndarray:
    """One uint8 picture (Y, X, 3 or 1) of images (N, C, Y, X) with values 0 ... levels - 1, side by side."""
    n, colours, height, width = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.zeros((rows, columns, height + 1, width + 1, colours), np.uint8)
    shown = (images.astype(np.float64) * (255 / (levels - 1))).round().astype(np.uint8)
    flat = sheet.reshape(rows * columns, height + 1, width + 1, colours)
    flat[:, -1], flat[:, :, -1] = 96, 96
    flat[:n, :height, :width] = shown.transpose(0, 2, 3, 1)
    picture = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 1), columns * (width + 1), colours)
    picture = picture.repeat(scale, 0).repeat(scale, 1)
    return picture if colours == 3 else picture.repeat(3, axis=2)
