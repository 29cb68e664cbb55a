"""What is read: episodes, found when a data set is opened, and clips of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .format import DataError


@dataclass(frozen=True)
class Clip:
    """frames (T, Y, X, C) uint8 (images) or float32 (latents); actions into frames, or None.

    `actions[i]` is the action that caused frame i: int64 (T,) with -1 = unknown, or float32 (T, A) with NaN = unknown.
    """

    frames: np.ndarray
    actions: np.ndarray | None
    source: str


@dataclass(frozen=True)
class Episode:
    """Frames without a cut, as found when opening. `actions[t]` (N-1 rows) causes frame t+1."""

    source: str  # for people: the file, and the episode in it
    identity: str  # decides the split; the same wherever the folder lies and whatever else is in it
    stamp: str  # a checksum of the content, see `Reader.stamp`
    file: Path
    key: Any  # the reader's own: what to read in the file
    length: int
    frame_shape: tuple[int, int, int]
    dtype: str  # "uint8" or "float32"
    actions: np.ndarray | None = field(repr=False)
    version: tuple[int, int] = (0, 0)  # of the file before it was looked through, see `file_version`

    @property
    def action_kind(self) -> str:
        if self.actions is None:
            return "no actions"
        return (
            "discrete actions" if self.actions.ndim == 1 else f"continuous actions of {self.actions.shape[1]} numbers"
        )


def file_version(file: Path) -> tuple[int, int]:
    """(size, time of change in ns): equal as long as nobody writes to the file or puts another in its place."""
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(file, f"cannot be opened any more: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


class Reader(Protocol):
    def files(self) -> list[Path]: ...

    def scan(self, file: Path, verify: bool) -> Iterator[Episode | DataError]:
        """What a file holds; a DataError, raised or yielded, for what it should hold and does not."""

    def frames(self, episode: Episode, indices: range) -> np.ndarray: ...

    def stamp(self, episode: Episode) -> str:
        """Of what the file holds now, nothing that was opened before being used again."""
