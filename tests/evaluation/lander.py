"""Frames with a lander drawn by hand, whose mass and centroid are known."""

from __future__ import annotations

import numpy as np

PURPLE = (128, 102, 230)
SKY, GROUND = 0, 255
# shares of pixels that the lander covers: 12 whole ones, 8 halves, 4 quarters
SHAPE = np.array(
    [
        [0.25, 0.5, 0.5, 0.25],
        [0.5, 1, 1, 0.5],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [0.5, 1, 1, 0.5],
        [0.25, 0.5, 0.5, 0.25],
    ]
)
MASS = 17.0
SHARPNESS = (12 + 8 / 4 + 4 / 16) / MASS


def draw(frame: np.ndarray, y: int, x: int, shape: np.ndarray = SHAPE) -> np.ndarray:
    """Blend a lander into a frame, its top left corner at (y, x); in place."""
    part = frame[y : y + shape.shape[0], x : x + shape.shape[1]]
    share = shape[: part.shape[0], : part.shape[1], None]
    part[:] = np.round(part * (1 - share) + np.array(PURPLE) * share)
    return frame


def scene(size: int = 64, channels: int = 3) -> np.ndarray:
    """Black sky, white ground, a yellow flag."""
    frame = np.full((size, size, channels), SKY, np.uint8)
    frame[size * 3 // 4 :] = GROUND
    if channels == 3:
        frame[size * 3 // 4 - 4 : size * 3 // 4 - 2, size // 2] = (204, 204, 0)
    return frame


def film(places: list[tuple[int, int] | None], size: int = 64) -> np.ndarray:
    """(T, Y, X, 3): a lander at each place, or none."""
    return np.stack([scene(size) if place is None else draw(scene(size), *place) for place in places])
