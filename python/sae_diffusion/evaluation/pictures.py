"""How alike two pictures are: PSNR, SSIM, and LPIPS where the user has it. Frames are uint8 (..., Y, X, C)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"  # of torchvision, in torch.hub's folder


def mean_squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(...,) of each frame, in squared grey levels."""
    return np.square(a.astype(np.float64) - b.astype(np.float64)).mean((-3, -2, -1))


def psnr(mse: Any) -> Any:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mse); infinite for equal frames."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / np.asarray(mse, np.float64))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity (...,) of each frame, the mean over pixels and channels (Wang et al. 2004, eq. 13).

    Gaussian windows of 11 x 11 pixels, sigma 1.5, wholly inside the frame (smaller frames: the largest odd size that
    fits); K1 = 0.01, K2 = 0.03, range 255.
    """
    shape, (height, width, channels) = a.shape[:-3], a.shape[-3:]
    size = min(11, height - 1 + height % 2, width - 1 + width % 2)
    weights = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * 1.5**2))
    rows, columns = (_windows(length, weights / weights.sum()) for length in (height, width))
    out = []
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    for one, two in zip(*(frames.reshape(-1, height, width, channels) for frames in (a, b))):
        x, y = (np.moveaxis(p.astype(np.float64), -1, 0) for p in (one, two))
        mx, my, xx, yy, xy = (rows @ p @ columns.T for p in (x, y, x * x, y * y, x * y))
        vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
        index = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        out.append(index.mean())
    return np.array(out).reshape(shape)


def _windows(length: int, weights: np.ndarray) -> np.ndarray:
    """(length - size + 1, length): a row of `weights` for each place of the window."""
    places = length - len(weights) + 1
    matrix = np.zeros((places, length))
    for i in range(places):
        matrix[i, i : i + len(weights)] = weights
    return matrix


def open_lpips() -> tuple[Any, str]:
    """The network of LPIPS (Zhang et al. 2018, AlexNet) and "", or None and why not. Nothing is downloaded."""
    if importlib.util.find_spec("lpips") is None or importlib.util.find_spec("torchvision") is None:
        return None, "LPIPS is not measured: the packages lpips and torchvision are not both installed"
    file = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS
    if not file.exists():
        return None, f"LPIPS is not measured: {file} is not there, and nothing is downloaded"
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval(), ""


@torch.no_grad()
def lpips_distance(network: Any, a: np.ndarray, b: np.ndarray, batch: int = 64) -> np.ndarray:
    """(...,) of each frame; 0 for equal ones."""
    shape = a.shape[:-3]
    pairs = [torch.from_numpy(x.reshape(-1, *x.shape[-3:])) for x in (a, b)]
    parts = []
    for one, two in zip(*(x.split(batch) for x in pairs)):
        x, y = ((t.permute(0, 3, 1, 2).float() / 127.5 - 1).expand(-1, 3, -1, -1) for t in (one, two))
        parts.append(network(x, y).flatten())
    return torch.cat(parts).double().numpy().reshape(shape)
