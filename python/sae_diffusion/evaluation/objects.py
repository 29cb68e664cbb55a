"""Is a coloured object of known size there, is it where it was recorded, and is it as heavy and as sharp?

N films, T frames, Y, X pixels. Everything is measured in the square of `side` pixels that holds most of the object's
colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

COLOURS: dict[str, tuple[int, int, int]] = {
    "lunar-lander": (128, 102, 230),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
PEAK = 0.6  # the least presence at the brightest pixel of an object
MASS = (0.5, 2.0)  # least and most mass, over the typical one
LEAST_GAP = 32  # between a colour's channels
MOST_OBJECTS = 9  # counted in a frame


@dataclass(frozen=True)
class Object:
    """What is looked for.

    Args:
        colour: red, green, blue; not grey.
        side: of the square, pixels; a little more than the object, at most the frame.
        within: pixels between the centroids of a hit.

    Raises:
        ValueError: a field breaks its rule.
    """

    colour: tuple[int, int, int]
    side: int = 13
    within: float = 3.0

    def __post_init__(self) -> None:
        if len(self.colour) != 3 or not all(0 <= c <= 255 for c in self.colour):
            raise ValueError(f"colour: must be red, green, blue from 0 to 255, got {self.colour}")
        if self.split()[2] < LEAST_GAP:
            raise ValueError(
                f"colour: must have channels at least {LEAST_GAP} apart, for grey is everywhere, got {self.colour}"
            )
        if self.side < 1:
            raise ValueError(f"side: must be at least 1, got {self.side}")
        if not self.within > 0:
            raise ValueError(f"within: must be > 0, got {self.within}")

    def split(self) -> tuple[list[int], list[int], int]:
        """The bright channels of the colour, the dark ones, and the gap between them: where its widest gap is."""
        order = sorted(range(3), key=lambda i: -self.colour[i])
        gaps = [self.colour[order[i]] - self.colour[order[i + 1]] for i in range(2)]
        cut = 1 + gaps.index(max(gaps))
        return order[:cut], order[cut:], max(gaps)


def parse_colour(text: str) -> tuple[int, int, int]:
    """A name of `COLOURS`, or "r,g,b"."""
    if text in COLOURS:
        return COLOURS[text]
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"object_colour: must be r,g,b or one of {', '.join(COLOURS)}, got {text!r}")
    return (int(parts[0]), int(parts[1]), int(parts[2]))


def presence(frames: np.ndarray, colour: Object) -> np.ndarray:
    """How much of each pixel is the object, in units of 1 / gap: integers (..., Y, X) from 0 to `gap`.

    presence = clip((min of the bright channels - max of the dark ones) / gap, 0, 1), times gap: purple (128, 102, 230)
    gives clip((B - max(R, G)) / 102). An object that covers a share a of a pixel on any grey gives a.
    """
    bright, dark, gap = colour.split()
    x = frames.astype(np.int64)
    return np.clip(x[..., bright].min(-1) - x[..., dark].max(-1), 0, gap)


@dataclass(frozen=True)
class Found:
    """The object in each frame, arrays (...): mass in pixels, peak and sharpness from 0 to 1, centroid or NaN."""

    mass: np.ndarray
    peak: np.ndarray
    sharpness: np.ndarray
    y: np.ndarray
    x: np.ndarray

    def detected(self, typical: float) -> np.ndarray:
        """Peak and mass are those of an object whose mass is `typical`."""
        return (self.peak >= PEAK) & (self.mass >= MASS[0] * typical) & (self.mass <= MASS[1] * typical)

    def distance(self, other: Found) -> np.ndarray:
        return np.hypot(self.y - other.y, self.x - other.x)


def find(frames: np.ndarray, wanted: Object) -> Found:
    """The heaviest square of each frame; of several the first one.

    Args:
        frames: uint8 (..., Y, X, 3).
    """
    _check(frames)
    shape, gap = frames.shape[:-3], wanted.split()[2]
    masks = presence(frames, wanted).reshape(-1, *frames.shape[-3:-1])
    rows, columns, squares = _heaviest(masks, wanted.side)
    p = squares / gap
    mass = p.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        y = (p.sum(2) * np.arange(p.shape[1])).sum(1) / mass + rows
        x = (p.sum(1) * np.arange(p.shape[2])).sum(1) / mass + columns
        sharpness = np.where(mass > 0, (p * p).sum((1, 2)) / mass, 0.0)
    parts = (mass, p.max((1, 2)), sharpness, y, x)
    return Found(*(part.reshape(shape) for part in parts))


def count(frames: np.ndarray, wanted: Object, typical: float) -> np.ndarray:
    """Number of objects in each frame, at most MOST_OBJECTS: the heaviest square is taken out again and again."""
    _check(frames)
    gap = wanted.split()[2]
    masks = presence(frames, wanted).reshape(-1, *frames.shape[-3:-1])
    numbers = np.zeros(len(masks), np.int64)
    for _ in range(MOST_OBJECTS):
        rows, columns, squares = _heaviest(masks, wanted.side)
        p = squares / gap
        mass, peak = p.sum((1, 2)), p.max((1, 2))
        numbers += (peak >= PEAK) & (mass >= MASS[0] * typical) & (mass <= MASS[1] * typical)
        if not (mass >= MASS[0] * typical).any():
            break
        for mask, row, column in zip(masks, rows, columns):
            mask[row : row + wanted.side, column : column + wanted.side] = 0
    return numbers.reshape(frames.shape[:-3])


def typical_mass(recorded: Found) -> float:
    """Median mass of recorded frames that show the colour; NaN where none does."""
    shown = recorded.peak >= PEAK
    return float(np.median(recorded.mass[shown])) if shown.any() else float("nan")


def object_tables(
    recorded: Found, generated: Found, typical: float, within: float, context: int
) -> dict[str, np.ndarray]:
    """Tables (N, T - context) for frames after the context, NaN where the recorded frame does not show the object.

    Returns:
        detected, hit (0 or 1), mass and sharpness over the recorded ones.
    """
    shown = recorded.detected(typical)
    there = generated.detected(typical)
    hit = there & (np.nan_to_num(generated.distance(recorded), nan=np.inf) <= within)
    with np.errstate(invalid="ignore", divide="ignore"):
        tables = {
            "detected": there.astype(np.float64),
            "hit": hit.astype(np.float64),
            "mass": generated.mass / recorded.mass,
            "sharpness": generated.sharpness / recorded.sharpness,
        }
    return {name: np.where(shown, table, np.nan)[:, context:] for name, table in tables.items()}


def _heaviest(masks: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Top rows, left columns and content of the heaviest square of each mask (F, Y, X) of integers."""
    height, width = (min(side, size) for size in masks.shape[1:])
    sums = np.pad(masks, ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)
    boxes = (
        sums[:, height:, width:] - sums[:, :-height, width:] - sums[:, height:, :-width] + sums[:, :-height, :-width]
    )
    best = boxes.reshape(len(masks), -1).argmax(1)
    rows, columns = np.unravel_index(best, boxes.shape[1:])
    windows = sliding_window_view(masks, (height, width), axis=(1, 2))  # type: ignore[call-overload]
    return rows, columns, windows[np.arange(len(masks)), rows, columns]


def _check(frames: np.ndarray, channels: Sequence[int] = (3,)) -> None:
    if frames.dtype != np.uint8 or frames.ndim < 3 or frames.shape[-1] not in channels:
        raise ValueError(
            f"frames: must be uint8 (..., Y, X, 3) to look for a colour, got {frames.dtype} {frames.shape}"
        )
