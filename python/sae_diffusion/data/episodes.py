"""Episodes, found when a data set is opened, and the clips that are cut from them."""

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
    """Consecutive frames, as found when the data set was opened. `actions[t]` (N-1 rows) causes frame t+1."""

    source: str  # for messages: the file, and the episode in it
    identity: str  # decides the split; independent of where the folder is and what else is in it
    stamp: str  # a checksum of the content, see `Reader.stamp`
    file: Path
    key: Any  # the reader's own: what to read in the file
    length: int
    frame_shape: tuple[int, int, int]
    dtype: str  # "uint8" or "float32"
    actions: np.ndarray | None = field(repr=False)
    version: tuple[int, int] = (0, 0)  # of the file before it was scanned, see `file_version`

    @property
    def action_kind(self) -> str:
        if self.actions is None:
            return "no actions"
        return (
            "discrete actions" if self.actions.ndim == 1 else f"continuous actions of {self.actions.shape[1]} numbers"
        )


def file_version(file: Path) -> tuple[int, int]:
    """(size, time of change in ns): equal as long as the file is neither written to nor replaced."""
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(file, f"can no longer be opened: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


class Reader(Protocol):
    def files(self) -> list[Path]: ...

    def scan(self, file: Path, verify: bool) -> Iterator[Episode | DataError]:
        """The episodes of a file; a DataError, raised or yielded, for each that cannot be used."""

    def frames(self, episode: Episode, indices: range) -> np.ndarray: ...

    def stamp(self, episode: Episode) -> str:
        """A checksum of what the file holds now, read anew."""
