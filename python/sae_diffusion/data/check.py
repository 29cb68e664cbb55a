"""Checks a folder of training data: each source with its frames and actions, or the reason why it cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .dataset import detect, scan
from .episodes import Episode, Reader
from .format import DataError


@dataclass(frozen=True)
class Source:
    """One episode; `reason` says why training would skip it, None where it would not.

    Attributes:
        shape: (Y, X, C) of a frame.
        actions: their kind, in words.
    """

    source: str
    reason: str | None
    frames: int | None = None
    shape: tuple[int, int, int] | None = None
    dtype: str | None = None
    actions: str | None = None

    @property
    def ok(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        if self.reason is not None:
            return self.reason
        return f"{self.frames} frames {'x'.join(map(str, self.shape or ()))} {self.dtype}, {self.actions}"


def check_data(
    path: str | os.PathLike[str],
    *,
    clip_length: int = 1,
    frame_stride: int = 1,
    size: tuple[int, int] | None = None,
) -> Iterator[Source]:
    """Every source that `open_dataset` would open, after reading all of its content.

    Args:
        clip_length: frames of a clip; sources too short for one clip are bad.
        frame_stride: frames from one frame of a clip to the next.
        size: (Y, X) that images will be resized to; without it all must have the same size.

    Raises:
        DataError: there is nothing to check.
    """
    reader = detect(Path(path))
    span = (clip_length - 1) * frame_stride + 1
    try:
        for found in scan(reader, size, verify=True):
            if isinstance(found, DataError):
                yield Source(found.source, found.reason)
                continue
            reason = _not_finite(reader, found)
            if found.length < span:
                reason = f"must have at least {span} frames, got {found.length}"
            yield Source(found.source, reason, found.length, found.frame_shape, found.dtype, found.action_kind)
    except DataError as error:  # of the folder as a whole
        yield Source(error.source, error.reason)


def _not_finite(reader: Reader, episode: Episode, at_once: int = 256) -> str | None:
    """What is wrong with the latents, which are not read when a data set is opened."""
    if episode.dtype == "float32":
        for first in range(0, episode.length, at_once):
            try:
                reader.frames(episode, range(first, min(first + at_once, episode.length)))
            except DataError as error:
                return error.reason
    return None
