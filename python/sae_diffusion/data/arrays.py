"""npz files of frames, images or latents."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .actions import check_actions
from .episodes import Episode
from .format import DataError, read_member


class NpzReader:
    """npz files: `frames` (T, Y, X, C) or (N, T, Y, X, C), uint8 or float (latents); optional `actions` to match.

    From an uncompressed file (np.savez) only a clip's own frames are read; the two compressed files used last are kept
    in memory.
    """

    def __init__(self, root: Path, files: list[Path]) -> None:
        self.root, self._files = root, files
        self._arrays: OrderedDict[Path, np.ndarray | _Stored] = OrderedDict()

    def files(self) -> list[Path]:
        return self._files

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": OrderedDict()}

    def scan(self, file: Path, verify: bool) -> Iterator[Episode | DataError]:
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if "frames.npy" not in names:
                    raise ValueError(f"must hold an array `frames`, got {names}")
                stamp = _zip_stamp(archive)
                shape, _, dtype = _read_header(archive.open("frames.npy"))
                actions = read_member(archive, "actions") if "actions.npy" in names else None
        except Exception as error:
            raise DataError(file, f"unreadable npz: {error!r}") from error
        if dtype != np.uint8 and dtype.kind != "f":
            raise DataError(file, f"frames must be uint8 or floats, got {dtype}")
        if len(shape) not in (4, 5) or 0 in shape:
            raise DataError(file, f"frames must be (T, Y, X, C) or (N, T, Y, X, C), none of them 0, got {shape}")
        y, x, c = shape[-3:]
        if dtype == np.uint8 and y in (1, 3, 4) and c > 4:
            raise DataError(
                file, f"frames must have channels last, (T, Y, X, C), got what looks like (T, C, Y, X): {shape}; "
                "store np.moveaxis(frames, -3, -1)"
            )  # fmt: skip
        clips = [None] if len(shape) == 4 else range(shape[0])
        if actions is not None and len(shape) == 5 and (actions.ndim < 2 or len(actions) != shape[0]):
            raise DataError(file, f"actions must be ({shape[0]}, T-1[, A]) for frames {shape}, got {actions.shape}")
        name = file.relative_to(self.root).as_posix()
        for n in clips:
            source = str(file) if n is None else f"{file}, clip {n}"
            try:
                rows = actions
                if actions is not None:
                    rows = check_actions(actions if n is None else actions[n], shape[-4], source)
                kind = "uint8" if dtype == np.uint8 else "float32"
                episode = Episode(source, f"{name}/{n or 0}", stamp, file, n, shape[-4], (y, x, c), kind, rows)
                if kind == "float32" and c in (1, 3, 4) and not n:
                    self._check_latents(episode)
                yield episode
            except DataError as error:
                yield error

    def _check_latents(self, episode: Episode) -> None:
        """Refuse pictures stored as floats: latents have values around 0."""
        some = self._read(episode, range(min(episode.length, 16)))
        low, high = some.min(), some.max()
        if low >= 0 and 16 < high <= 255:
            raise DataError(
                episode.source, f"float frames must be latents, got values from {low:g} to {high:g} like those of "
                "pixels; store frames.astype(np.uint8)"
            )  # fmt: skip

    def frames(self, episode: Episode, indices: range) -> np.ndarray:
        frames = self._read(episode, indices)
        if episode.dtype == "float32":
            if not np.isfinite(frames).all():
                raise DataError(episode.source, f"frames {indices} hold NaN or infinity")
            frames = frames.astype(np.float32)
        return frames

    def _read(self, episode: Episode, indices: range) -> np.ndarray:
        array = self._arrays.pop(episode.file, None)
        try:
            if array is None:
                array = _open_member(episode.file, "frames")
            self._arrays[episode.file] = array
            if len(self._arrays) > 2:
                self._arrays.popitem(last=False)
            if isinstance(array, _Stored):
                return array.frames(episode.key, indices)
            video = array if episode.key is None else array[episode.key]
            return np.array(video[indices.start : indices.stop : indices.step])
        except Exception as error:
            raise DataError(episode.source, f"unreadable npz: {error!r}") from error

    def stamp(self, episode: Episode) -> str:
        self._arrays.pop(episode.file, None)
        with zipfile.ZipFile(episode.file) as archive:
            return _zip_stamp(archive)


def _zip_stamp(archive: zipfile.ZipFile) -> str:
    """The checksums of all members, each compared with the bytes."""
    if (damaged := archive.testzip()) is not None:
        raise ValueError(f"{damaged}: wrong checksum")
    return "".join(f"{info.CRC:08x}" for info in archive.infolist())


@dataclass(frozen=True)
class _Stored:
    """An uncompressed array (..., T, Y, X, C) in a file; read, not mapped, so that a truncated file is an error."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def frames(self, clip: int | None, indices: range) -> np.ndarray:
        out = np.empty((len(indices), *self.shape[-3:]), self.dtype)
        first = (clip or 0) * self.shape[-4]
        parts = [out] if indices.step == 1 else list(out)
        with open(self.path, "rb") as file:
            for i, part in zip(indices, parts):
                file.seek(self.offset + (first + i) * out[0].nbytes)
                if file.readinto(part.data) != part.nbytes:
                    raise ValueError(f"truncated at frame {i}")
        return out


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"the npy version must be 1.0 or 2.0, got {version}")


def _open_member(path: Path, name: str) -> np.ndarray | _Stored:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name + ".npy")
        _, fortran, _ = _read_header(archive.open(info))
        if fortran or info.compress_type != zipfile.ZIP_STORED:
            return read_member(archive, name)
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # the local header: 30 bytes, its last four the lengths of name and extra
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(int(lengths.sum()), os.SEEK_CUR)
        shape, _, dtype = _read_header(file)
        return _Stored(path, file.tell(), shape, dtype)
