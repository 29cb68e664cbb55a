"""Is a folder of data good to train on: every source, its frames and actions, or why it cannot be used."""

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
    """One episode as found; `reason` says why training would skip it, and is None where it would not.

    Attributes:
        shape: (Y, X, C) of a frame.
        actions: what kind, in words.
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
    """Every source of what `open_dataset` opens, all of its content read.

    Args:
        clip_length: a source with fewer frames than a clip of that length is bad.
        frame_stride: of such a clip.
        size: (Y, X) that images will be resized to; without it all must be of one size.

    Raises:
        DataError: there is nothing that could be looked through.
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
                reason = f"has {found.length} frames, needs {span}"
            yield Source(found.source, reason, found.length, found.frame_shape, found.dtype, found.action_kind)
    except DataError as error:  # of the folder as a whole
        yield Source(error.source, error.reason)


def _not_finite(reader: Reader, episode: Episode, at_once: int = 256) -> str | None:
    """What is wrong with the latents, which opening a data set does not read."""
    if episode.dtype == "float32":
        for first in range(0, episode.length, at_once):
            try:
                reader.frames(episode, range(first, min(first + at_once, episode.length)))
            except DataError as error:
                return error.reason
    return None
