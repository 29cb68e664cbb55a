"""A Fréchet distance between sets of frames, on statistics of a filter bank made by hand: no weights, no download.

The features of a frame are, at 1, 1/2 and 1/4 of its size (means of 2 x 2 pixels) and for the three planes grey
(R + G + B) / 3, red-green R - G and blue-yellow B - (R + G) / 2: the standard deviation over pixels and the root mean
squares of the differences to the right and downwards, of the Laplacian, and of the change since the frame before; and
the mean of each plane. All in grey levels.

It sees blur, noise, flicker, wrong colours, and a coloured object that vanishes or doubles. It does not see where
things are, nor whether actions were followed: the other metrics do.
"""

from __future__ import annotations

import numpy as np

SCALES = 3
FEATURES = 3 + SCALES * 3 * 5


def planes(frames: np.ndarray) -> np.ndarray:
    """uint8 (..., Y, X, 3 or 1) -> fp64 (..., 3, Y, X)."""
    x = np.broadcast_to(frames, (*frames.shape[:-1], 3)).astype(np.float64)
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    return np.stack([(r + g + b) / 3, r - g, b - (r + g) / 2], axis=-3)


def frame_features(frames: np.ndarray) -> np.ndarray:
    """(N, T, Y, X, C) uint8 -> (N, T - 1, FEATURES) of all frames but the first of each film."""
    out = []
    for film in frames:
        x = planes(film)  # (T, 3, Y, X)
        parts = [x[1:].mean((-2, -1))]
        for _ in range(SCALES):
            now = x[1:]
            parts += [now.std((-2, -1)), *(_rms(d) for d in _differences(now)), _rms(now - x[:-1])]
            x = _half(x)
        out.append(np.concatenate(parts, axis=-1))
    return np.stack(out)


def _differences(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """To the right, downwards, and the Laplacian inside."""
    inside = x[..., 1:-1, 1:-1]
    around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :], around - 4 * inside


def _rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(x).mean((-2, -1))) if x.size else np.zeros(x.shape[:-2])


def _half(x: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels; an odd last row or column is left out, a single one stays."""
    height, width = (max(size // 2, 1) for size in x.shape[-2:])
    tall, wide = (min(size, 2) for size in x.shape[-2:])
    cut = x[..., : height * tall, : width * wide]
    return cut.reshape(*x.shape[:-2], height, tall, width, wide).mean((-3, -1))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (n, F) and (m, F) with covariances A, B.

    Dowson and Landau 1982; squared grey levels. Both sets must have two rows or more.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != a.shape[1]:
            raise ValueError(f"{name}: must be (n, {a.shape[-1]}) with n >= 2, got {x.shape}")
    first, second = (np.cov(x, rowvar=False).reshape(x.shape[1], -1) for x in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # tr (A B)^(1/2) from the symmetric A^(1/2) B A^(1/2), which has the same eigenvalues
    shared = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * shared
    return float(max(distance, 0.0))
