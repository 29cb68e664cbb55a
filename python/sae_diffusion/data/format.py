"""The on-disk episode format: `dataset.json` and shards of episodes, readable with numpy alone.

    dataset.json           how the episodes were made (see `collect`)
    shard-00000.npz        episodes_per_shard episodes; members, each compressed and checksummed by itself:
        index.npy                        uint8, JSON: which episodes, their seeds, lengths and ends
        00000017/actions.npy             (N-1,) int64 or (N-1, A) float32; row t causes frame t+1
        00000017/frames/000003.npy       uint8 (up to FRAMES_PER_CHUNK, Y, X, 3)
    staging/episode-00000017.npz         finished episodes of a shard that is not full yet, with the same members

A zip file has a directory, so reading a clip reads only the chunks that it touches. Every file appears whole or not at
all, and its bytes depend on the settings only.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..disk import atomic_path

FORMAT = "sae-episodes"
VERSION = 1
FRAMES_PER_CHUNK = 16  # the least that is read for a clip; 16 frames of 64x64 take about 1 ms to decompress


class DataError(ValueError):
    """A file that cannot be used: `source` (the file, and the episode in it) and `reason`."""

    def __init__(self, source: str | os.PathLike[str], reason: str) -> None:
        self.source, self.reason = str(source), reason
        super().__init__(f"{self.source}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:  # so that it can be sent from a DataLoader worker
        return DataError, (self.source, self.reason)


def shard_path(root: Path, shard: int) -> Path:
    return root / f"shard-{shard:05d}.npz"


def staged_path(root: Path, episode: int) -> Path:
    return root / "staging" / f"episode-{episode:08d}.npz"


def read_description(root: Path) -> dict[str, Any]:
    """The content of dataset.json; DataError if it is not in this format and version."""
    path = root / "dataset.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != FORMAT or description["version"] != VERSION:
            raise ValueError(f"got {description['format']} version {description['version']}")
        size, space = description["size"], description["action_space"]
        if len(size) != 2 or min(size) < 1 or space["kind"] not in ("discrete", "continuous"):
            raise ValueError(f"size or action_space is invalid, got {size} and {space}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(path, f"must be a description in format {FORMAT} version {VERSION}: {error!r}") from error
    return description


def _write_member(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    # a member opened by name is dated 1980-01-01, so that the same data gives the same bytes
    with archive.open(name + ".npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def _write_index(archive: zipfile.ZipFile, episodes: Sequence[dict[str, Any]]) -> None:
    index = {"format": FORMAT, "version": VERSION, "chunk": FRAMES_PER_CHUNK, "episodes": list(episodes)}
    _write_member(archive, "index", np.frombuffer(json.dumps(index).encode(), np.uint8))


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array, its checksum verified."""
    with archive.open(name + ".npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # zipfile compares the checksum only at the end
            raise ValueError(f"{name}: must end with the array, got more bytes")
    return array


class EpisodeWriter:
    """Writes one episode frame by frame, in bounded memory; see `write_episode`."""

    def __init__(self, archive: zipfile.ZipFile, episode: int) -> None:
        self._archive, self.episode = archive, episode
        self.frames: list[np.ndarray] = []
        self.actions: list[Any] = []
        self.count = 0
        self.complete = False

    def add(self, frame: np.ndarray, action: Any) -> None:
        if (action is None) != (self.count == 0):
            raise ValueError(f"action: must be None for the first frame only, got {action!r} for frame {self.count}")
        if action is not None:
            self.actions.append(action)
        self.frames.append(frame)
        self.count += 1
        if len(self.frames) == FRAMES_PER_CHUNK:
            self._flush()

    def _flush(self) -> None:
        chunk = (self.count - 1) // FRAMES_PER_CHUNK
        _write_member(self._archive, f"{self.episode:08d}/frames/{chunk:06d}", np.stack(self.frames))
        self.frames = []

    def finish(self, actions: np.ndarray, entry: dict[str, Any]) -> None:
        if self.frames:
            self._flush()
        _write_member(self._archive, f"{self.episode:08d}/actions", actions)
        _write_index(self._archive, [{"episode": self.episode, "frames": self.count, **entry}])
        self.complete = True


@contextmanager
def write_episode(path: Path, episode: int) -> Iterator[EpisodeWriter]:
    """Call `add(uint8 (Y, X, 3), action)` for each frame, action None for the first, then `finish`, else no file."""
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive,
    ):
        writer = EpisodeWriter(archive, episode)
        yield writer
        if not writer.complete:
            raise RuntimeError(f"{path}: finish() was not called")


class Shard:
    """Reads a shard (or a staged episode). Each process opens its own handle: it is not shared by a fork or pickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._pid = -1
        try:
            index = json.loads(read_member(self.archive, "index").tobytes())
            if index["format"] != FORMAT or index["version"] != VERSION:
                raise ValueError(f"got {index['format']} version {index['version']}")
            self.chunk = int(index["chunk"])
            self.episodes: dict[int, dict[str, Any]] = {int(e["episode"]): e for e in index["episodes"]}
            if self.chunk < 1 or any(int(e["frames"]) < 1 for e in self.episodes.values()):
                raise ValueError("the index must list episodes with frames, got one without")
        except Exception as error:  # a broken file can raise anything from zipfile, zlib, numpy or json
            raise DataError(path, f"unreadable shard: {error!r}") from error

    @property
    def archive(self) -> zipfile.ZipFile:
        if self._archive is None or self._pid != os.getpid():
            self._archive, self._pid = zipfile.ZipFile(self.path), os.getpid()
        return self._archive

    def close(self) -> None:
        if self._archive is not None and self._pid == os.getpid():
            self._archive.close()
        self._archive = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def _members(self, episode: int) -> list[str]:
        chunks = -(-self.episodes[episode]["frames"] // self.chunk)
        return [f"{episode:08d}/frames/{c:06d}" for c in range(chunks)] + [f"{episode:08d}/actions"]

    def _read(self, episode: int, name: str) -> np.ndarray:
        try:
            return read_member(self.archive, name)
        except Exception as error:
            raise DataError(f"{self.path}, episode {episode}", f"unreadable {name}: {error!r}") from error

    def actions(self, episode: int) -> np.ndarray:
        return self._read(episode, f"{episode:08d}/actions")

    def frames(self, episode: int, indices: Sequence[int]) -> np.ndarray:
        """The frames at increasing `indices`, uint8 (len(indices), Y, X, 3)."""
        picked, chunk, number = [], np.empty(0), -1
        for i in indices:
            if i // self.chunk != number:
                number = i // self.chunk
                chunk = self._read(episode, f"{episode:08d}/frames/{number:06d}")
                wanted = min(self.chunk, self.episodes[episode]["frames"] - number * self.chunk)
                if chunk.dtype != np.uint8 or chunk.ndim != 4 or len(chunk) != wanted:
                    raise DataError(
                        f"{self.path}, episode {episode}",
                        f"chunk {number} must be uint8 ({wanted}, Y, X, C), got {chunk.dtype} {chunk.shape}",
                    )
            picked.append(chunk[i % self.chunk])
        return np.stack(picked)

    def verify(self, episode: int, frame_shape: tuple[int, ...]) -> None:
        """Read a whole episode; DataError if a checksum or a shape is wrong."""
        self.actions(episode)
        for start in range(0, self.episodes[episode]["frames"], self.chunk):
            got = self.frames(episode, [start]).shape[1:]
            if got != frame_shape:
                raise DataError(f"{self.path}, episode {episode}", f"frames must be {frame_shape}, got {got}")

    def stamp(self, episode: int) -> str:
        """The checksums of an episode's members, read from the zip directory only."""
        try:
            return "".join(f"{self.archive.getinfo(name + '.npy').CRC:08x}" for name in self._members(episode))
        except KeyError as error:
            raise DataError(f"{self.path}, episode {episode}", f"incomplete: {error}") from error


def pack_shard(path: Path, sources: dict[int, Shard]) -> None:
    """Write the episodes of `sources` (episode number -> a file that holds it), in order, as one shard."""
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive,
    ):
        for episode, source in sorted(sources.items()):
            for name in source._members(episode):
                _write_member(archive, name, source._read(episode, name))
        _write_index(archive, [source.episodes[episode] for episode, source in sorted(sources.items())])


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (T, Y, X, C) at size (Y, X): area average when shrinking, nearest pixel when enlarging."""
    if frames.shape[1:3] == tuple(size):
        return frames
    from PIL import Image

    def one(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX))

    if frames.shape[-1] == 3:
        return np.stack([one(frame) for frame in frames])
    channels = range(frames.shape[-1])
    return np.stack([np.stack([one(frame[..., c]) for c in channels], axis=-1) for frame in frames])
