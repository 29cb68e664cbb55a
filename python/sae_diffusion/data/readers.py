"""Clips of video with actions, from recorded episodes, folders of video files, or npz files."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import zipfile
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .format import DataError, Shard, read_description, read_member, resize_frames

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
ACTION_SUFFIXES = (".npy", ".csv", ".json")


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


# ---- actions ----


def check_actions(raw: Any, frames: int, source: str) -> np.ndarray:
    """N-1 rows for N frames (row t causes frame t+1), or N with the last ignored; int64 (N-1,) or float32 (N-1, A)."""
    rows = np.asarray(raw)
    if rows.dtype.kind not in "iuf":
        raise DataError(source, f"actions must be integers or floats, are {rows.dtype}")
    if rows.ndim == 2 and rows.shape[1] == 1 and rows.dtype.kind != "f":
        rows = rows[:, 0]
    if rows.ndim == 1 and rows.dtype.kind == "f":
        rows = rows[:, None]
    if rows.ndim != (2 if rows.dtype.kind == "f" else 1) or 0 in rows.shape[1:]:
        raise DataError(source, f"actions must be one integer or A floats per row, are {rows.dtype} {rows.shape}")
    if len(rows) not in (frames - 1, frames):
        raise DataError(
            source,
            f"{len(rows)} rows of actions for {frames} frames: must be {frames - 1} (row t causes frame t+1) "
            f"or {frames} (the last ignored)",
        )
    rows = rows[: frames - 1]
    if rows.dtype.kind == "f":
        if not np.isfinite(rows).all():
            raise DataError(source, f"action {int(np.argmin(np.isfinite(rows).all(1)))} is NaN or infinite")
        return rows.astype(np.float32)
    if len(rows) and (rows.min() < 0 or rows.max() > 2**31):
        raise DataError(source, f"discrete actions must be 0, 1, 2, ..., are {rows.min()} to {rows.max()}")
    return rows.astype(np.int64)


def _read_csv(path: Path) -> np.ndarray:
    with open(path, newline="", encoding="utf-8") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]

    def number(cell: str) -> bool:
        try:
            float(cell)
        except ValueError:
            return False
        return True

    if rows and not any(number(cell) for cell in rows[0]):
        rows = rows[1:]  # a header
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]) or not all(number(cell) for cell in row):
            raise ValueError(f"row {i} must be {len(rows[0])} numbers, is {','.join(row)!r}")
    discrete = all(len(row) == 1 and re.fullmatch(r"[+-]?\d+", row[0]) for row in rows)
    return np.array([[int(c) if discrete else float(c) for c in row] for row in rows])


def read_side_file(video: Path, frames: int) -> np.ndarray | None:
    """Actions of `clip.mp4`: `clip.actions.npy`, `.csv` (header or not) or `.json` (a list, or {"actions": list})."""
    found = [p for s in ACTION_SUFFIXES if (p := video.with_name(f"{video.stem}.actions{s}")).exists()]
    if not found:
        return None
    if len(found) > 1:
        raise DataError(video, f"has several files of actions: {', '.join(p.name for p in found)}")
    return check_actions(_read_rows(found[0]), frames, str(found[0]))


def read_actions(path: Path) -> np.ndarray:
    """All rows of a file of actions as beside a video, each causing one frame: int64 (N,) or float32 (N, A)."""
    rows = _read_rows(path)
    if rows.ndim < 1 or not len(rows):
        raise DataError(path, f"must hold a row of actions for each frame, is {rows.dtype} {rows.shape}")
    return check_actions(rows, len(rows) + 1, str(path))


def _read_rows(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".csv":
            return _read_csv(path)
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            return np.array(content["actions"] if isinstance(content, dict) else content)
        raise ValueError(f"must end with {', '.join(ACTION_SUFFIXES)}")
    except Exception as error:
        raise DataError(path, f"unreadable actions: {error!r}") from error


# ---- the three formats ----


class RecordedReader:
    """Folders written by `collect`."""

    def __init__(self, root: Path) -> None:
        self.root, self.description = root, read_description(root)
        self._open: OrderedDict[Path, Shard] = OrderedDict()

    def files(self) -> list[Path]:
        found = sorted(self.root.glob("shard-*.npz"))
        if not found:
            staged = len(list(self.root.glob("staging/episode-*.npz")))
            raise DataError(self.root, f"no complete shard ({staged} staged episodes): let `collect` finish first")
        return found

    def _shard(self, file: Path) -> Shard:
        shard = self._open.pop(file, None) or Shard(file)
        self._open[file] = shard
        if len(self._open) > 32:  # file handles, in every loader process
            self._open.popitem(last=False)[1].close()
        return shard

    def scan(self, file: Path, verify: bool) -> Iterator[Episode | DataError]:
        shard, space = self._shard(file), self.description["action_space"]
        made = {k: v for k, v in self.description.items() if k not in ("episodes_per_shard", "frames_per_chunk")}
        name = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
        for number, entry in shard.episodes.items():
            source = f"{file}, episode {number}"
            try:
                shape = (*self.description["size"], 3)
                if verify:
                    shard.verify(number, shape)
                actions = check_actions(shard.actions(number), entry["frames"], source)
                wanted = ("i", 1) if space["kind"] == "discrete" else ("f", 2)
                if (actions.dtype.kind, actions.ndim) != wanted or (
                    actions.ndim == 2 and actions.shape[1] != space["dim"]
                ):
                    raise DataError(source, f"actions {actions.dtype} {actions.shape} do not fit dataset.json: {space}")
                if actions.ndim == 1 and actions.size and actions.max() >= space["n"]:
                    raise DataError(source, f"action {actions.max()} but dataset.json has only {space['n']}")
                stamp = shard.stamp(number)
                yield Episode(source, f"{name}/{number}", stamp, file, number, entry["frames"], shape, "uint8", actions)
            except DataError as error:
                yield error

    def frames(self, episode: Episode, indices: range) -> np.ndarray:
        return self._shard(episode.file).frames(episode.key, indices)

    def stamp(self, episode: Episode) -> str:
        old = self._open.pop(episode.file, None)
        if old is not None:
            old.close()
        return self._shard(episode.file).stamp(episode.key)


class VideoReader:
    """Video files (PyAV), each with an optional side file of actions; each decoded once when opened."""

    def __init__(self, root: Path, files: list[Path]) -> None:
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise ImportError("reading video needs the package av: pip install av") from error
        self.root, self._files = root, files

    def files(self) -> list[Path]:
        return self._files

    def scan(self, file: Path, verify: bool) -> Iterator[Episode | DataError]:
        import av

        times: list[int] = []
        shape = None
        try:
            with av.open(str(file)) as container:
                if not container.streams.video:
                    raise ValueError("no video stream")
                stream = _one_thread(container.streams.video[0])
                packets = 0
                for packet in container.demux(stream):
                    packets += packet.size > 0
                    for image in packet.decode():
                        if image.is_corrupt or image.pts is None or (times and image.pts <= times[-1]):
                            raise ValueError(f"frame {len(times)} is damaged or has no increasing time stamp")
                        if shape not in (None, (image.height, image.width, 3)):
                            raise ValueError(f"frame {len(times)} changes the size from {shape}")
                        shape = (image.height, image.width, 3)
                        times.append(image.pts)
                if packets < stream.frames:
                    raise ValueError(f"cut short: {packets} of {stream.frames} frames are there")
            if shape is None:
                raise ValueError("no frames")
            digest = _sha256(file)
        except Exception as error:  # PyAV's errors share no base class
            raise DataError(file, f"unreadable video: {error!r}") from error
        actions = read_side_file(file, len(times))
        identity = file.relative_to(self.root).as_posix()
        key = np.array(times, np.int64)
        yield Episode(str(file), identity, digest, file, key, len(times), shape, "uint8", actions)

    def frames(self, episode: Episode, indices: range) -> np.ndarray:
        wanted = [int(t) for t in episode.key[indices.start : indices.stop : indices.step]]
        reason = "frames are gone that were there when it was opened"
        for seek in (wanted[0], None):  # from the key frame before the clip, else from the start
            found: list[np.ndarray] = []
            try:
                found = _decode(episode.file, wanted, seek)
            except Exception as error:  # only its words: its traceback would keep decoder and frames alive
                reason = f"unreadable video: {error!r}"
            if len(found) == len(wanted):
                return np.stack(found)
        raise DataError(episode.source, reason)

    def stamp(self, episode: Episode) -> str:
        return _sha256(episode.file)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _decode(file: Path, times: list[int], seek: int | None) -> list[np.ndarray]:
    """The frames at `times`, up to the first that is not there."""
    import av

    found: list[np.ndarray] = []
    with av.open(str(file)) as container:
        stream = _one_thread(container.streams.video[0])
        if seek is not None:
            container.seek(seek, stream=stream)
        for image in container.decode(stream):
            if image.pts > times[len(found)]:
                break
            if image.pts == times[len(found)]:
                found.append(image.to_ndarray(format="rgb24"))
                if len(found) == len(times):
                    break
    return found


def _one_thread(stream: Any) -> Any:
    """A decoder with threads that is alive at a fork (an exception may hold it) hangs the child that frees it."""
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


class NpzReader:
    """npz files: `frames` (T, Y, X, C) or (N, T, Y, X, C), uint8 or float (latents); optional `actions` likewise.

    Of uncompressed files (np.savez) a clip reads its own frames only; of compressed ones the two used last are held
    whole.
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
                    raise ValueError(f"no array `frames`, only {names}")
                stamp = _zip_stamp(archive)
                shape, _, dtype = _read_header(archive.open("frames.npy"))
                actions = read_member(archive, "actions") if "actions.npy" in names else None
        except Exception as error:
            raise DataError(file, f"unreadable npz: {error!r}") from error
        if dtype != np.uint8 and dtype.kind != "f":
            raise DataError(file, f"frames must be uint8 or floats, are {dtype}")
        if len(shape) not in (4, 5) or 0 in shape:
            raise DataError(file, f"frames must be (T, Y, X, C) or (N, T, Y, X, C), are {shape}")
        y, x, c = shape[-3:]
        if dtype == np.uint8 and y in (1, 3, 4) and c > 4:
            raise DataError(
                file, f"frames must have channels last, (T, Y, X, C), look like (T, C, Y, X): {shape}; "
                "store np.moveaxis(frames, -3, -1)"
            )  # fmt: skip
        clips = [None] if len(shape) == 4 else range(shape[0])
        if actions is not None and len(shape) == 5 and (actions.ndim < 2 or len(actions) != shape[0]):
            raise DataError(file, f"actions must be ({shape[0]}, T-1[, A]) like frames {shape}, are {actions.shape}")
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
                episode.source, f"floats are latents, these are {low:g} to {high:g} like the pixels of images; "
                "store frames.astype(np.uint8)"
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
    """An uncompressed array (..., T, Y, X, C) in a file: read and not mapped, so that a file cut short is an error."""

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
                    raise ValueError(f"cut short at frame {i}")
        return out


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"npy version {version}")


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


# ---- the data set ----


class ClipDataset(torch.utils.data.Dataset):
    """Clips of fixed length; `ds[i]` -> Clip depends on i and the files only. Made by `open_dataset`.

    frame_shape (Y, X, C); is_latent; num_actions (discrete, 0 = none); action_dim (continuous, 0 = none); fps or None;
    episodes; others, the usable ones that are not in the split; skipped: list of (source, reason). Can be pickled, and
    used after a fork.
    """

    def __init__(
        self,
        reader: Reader,
        episodes: Sequence[Episode],
        skipped: Sequence[tuple[str, str]],
        clip_length: int,
        *,
        size: tuple[int, int] | None,
        frame_stride: int,
        clip_stride: int | None,
        num_actions: int,
        fps: float | None = None,
        others: Sequence[Episode] = (),
    ) -> None:
        self._reader, self.episodes, self.skipped = reader, list(episodes), list(skipped)
        self.clip_length, self.size, self.frame_stride = clip_length, size, frame_stride
        self._span = (clip_length - 1) * frame_stride + 1
        self._chosen_stride, self.clip_stride = clip_stride, clip_stride or self._span
        first = self.episodes[0]
        self.frame_shape = (*(size or first.frame_shape[:2]), first.frame_shape[2])
        self.is_latent = first.dtype == "float32"
        self.num_actions = num_actions
        self.action_dim = first.actions.shape[1] if first.actions is not None and first.actions.ndim == 2 else 0
        self.fps, self.others = fps, list(others)
        counts = [(episode.length - self._span) // self.clip_stride + 1 for episode in self.episodes]
        self._ends = np.cumsum(counts).tolist()
        self._versions: dict[str, tuple[int, int]] = {}  # of files whose time changed and whose content did not

    def __len__(self) -> int:
        return self._ends[-1]

    def frames_of(self, episode: Episode) -> int:
        """Length of the longest clip of an episode."""
        return (episode.length - 1) // self.frame_stride + 1

    def cut(self, clip_length: int, episodes: Sequence[Episode]) -> ClipDataset:
        """Clips of another length from some of the episodes; those too short for one are left out, not all may be."""
        return ClipDataset(
            self._reader,
            [episode for episode in episodes if self.frames_of(episode) >= clip_length],
            self.skipped,
            clip_length,
            size=self.size,
            frame_stride=self.frame_stride,
            clip_stride=self._chosen_stride,
            num_actions=self.num_actions,
            fps=self.fps,
        )

    def locate(self, index: int) -> tuple[Episode, range]:
        """The episode of clip `index` and the frames of it that the clip takes."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: must be below {len(self)}, got {index}")
        index %= len(self)
        which = bisect_right(self._ends, index)
        start = (index - (self._ends[which - 1] if which else 0)) * self.clip_stride
        return self.episodes[which], range(start, start + self._span, self.frame_stride)

    def __getitem__(self, index: int) -> Clip:
        episode, indices = self.locate(int(index))
        try:
            frames = self._reader.frames(episode, indices)
        finally:  # what could not be read may be so because it changed
            self._check_unchanged(episode)
        wanted = (self.clip_length, *episode.frame_shape)
        if frames.shape != wanted or frames.dtype != episode.dtype:
            raise DataError(
                episode.source, f"frames must be {episode.dtype} {wanted}, are {frames.dtype} {frames.shape}"
            )
        if self.size is not None:
            frames = resize_frames(frames, self.size)
        return Clip(frames, _into_frames(episode.actions, indices), f"{episode.source}, frame {indices.start}")

    def _check_unchanged(self, episode: Episode) -> None:
        """A touched or copied file, or a folder that `collect` adds to, passes: the content decides.

        Raises:
            DataError: the file is gone, or holds something else than when the data set was opened.
        """
        version = file_version(episode.file)
        if version == self._versions.get(episode.source, episode.version):
            return
        try:
            same = self._reader.stamp(episode) == episode.stamp
        except Exception:  # whatever a broken file provokes
            same = False
        if not same:
            sizes = f"{episode.version[0]} bytes then, {version[0]} now"
            raise DataError(episode.source, f"has changed since it was opened ({sizes})")
        self._versions[episode.source] = version

    def fingerprint(self) -> str:
        """A hash of the episodes' identity, length and content, to be kept with a checkpoint."""
        digest = hashlib.sha256()
        for episode in self.episodes:
            digest.update(f"{episode.identity}\0{episode.length}\0{episode.stamp}\0".encode())
            if episode.actions is not None:
                digest.update(episode.actions.tobytes())
        return digest.hexdigest()


def _into_frames(actions: np.ndarray | None, indices: range) -> np.ndarray | None:
    """The action that caused each frame: the one taken at the frame before it, one stride earlier, if there is one."""
    if actions is None:
        return None
    if actions.ndim == 1:
        unknown: Any = np.int64(-1)
    else:
        unknown = np.full(actions.shape[1], np.nan, np.float32)
    return np.stack([actions[i - indices.step] if i >= indices.step else unknown for i in indices])


def is_heldout(identity: str, fraction: float) -> bool:
    """A fixed draw per episode: adding data never moves an episode to the other side."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") < fraction * 2**64


def _detect(path: Path) -> Reader:
    if not path.exists():
        raise DataError(path, "does not exist")
    if path.is_file():
        files = [path]
    elif (path / "dataset.json").exists():
        return RecordedReader(path)
    else:
        files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
    videos = [f for f in files if f.suffix.lower() in VIDEO_SUFFIXES]
    arrays = [f for f in files if f.suffix.lower() == ".npz"]
    if bool(videos) == bool(arrays):
        what = "both videos and npz files" if videos else "neither dataset.json, nor videos, nor npz files"
        raise DataError(path, f"has {what}")
    root = path if path.is_dir() else path.parent
    return VideoReader(root, videos) if videos else NpzReader(root, arrays)


def open_dataset(
    path: str | os.PathLike[str],
    clip_length: int,
    *,
    size: tuple[int, int] | None = None,
    frame_stride: int = 1,
    clip_stride: int | None = None,
    on_error: str = "raise",
    split: str = "all",
    heldout_fraction: float = 0.1,
) -> ClipDataset:
    """Open a folder of `collect`, a folder (or one file) of videos, or a folder (or one file) of npz, whichever it is.

    A clip is `clip_length` frames, every `frame_stride`-th; clips start every `clip_stride` frames (default: where the
    one before ends, no overlap). With a stride the action into a frame is the one taken at the clip's frame before it.
    `size` (Y, X) resizes images by area. `split`: "train" | "heldout" by a hash of each episode's identity.
    A file that changes afterwards is a DataError when a clip of it is read.
    What cannot be used (corrupt, of another shape, other actions, too short) raises DataError (a ValueError) naming
    file and reason, or with on_error="skip" is listed in `.skipped`. Skipping verifies all of the content at once;
    raising verifies recorded shards as they are read, the others at once as well.
    """
    for name, value in (("clip_length", clip_length), ("frame_stride", frame_stride), ("clip_stride", clip_stride)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: must be 'raise' or 'skip', got {on_error!r}")
    if split not in ("all", "train", "heldout"):
        raise ValueError(f"split: must be 'all', 'train' or 'heldout', got {split!r}")
    if not 0 <= heldout_fraction <= 1:
        raise ValueError(f"heldout_fraction: must be in [0, 1], got {heldout_fraction}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: must be (Y, X) >= 1, got {size!r}")

    reader = _detect(Path(path))
    found: list[Episode] = []
    skipped: list[tuple[str, str]] = []

    def refuse(error: DataError) -> None:
        if on_error == "raise":
            raise error
        skipped.append((error.source, error.reason))

    for file in reader.files():
        try:
            version = file_version(file)
            for episode in reader.scan(file, verify=on_error == "skip"):
                if isinstance(episode, DataError):
                    refuse(episode)
                elif problem := _unlike(episode, found[0] if found else None, size):
                    refuse(DataError(episode.source, problem))
                else:
                    found.append(replace(episode, version=version))
        except DataError as error:
            refuse(error)

    description = getattr(reader, "description", {})
    num_actions = description.get("action_space", {}).get("n", 0)
    if not num_actions:
        discrete = [e.actions for e in found if e.actions is not None and e.actions.ndim == 1]
        num_actions = max((int(a.max(initial=-1)) + 1 for a in discrete), default=0)
    used: list[Episode] = []
    others: list[Episode] = []
    for e in found:
        mine = split == "all" or is_heldout(e.identity, heldout_fraction) == (split == "heldout")
        (used if mine else others).append(e)
    span = (clip_length - 1) * frame_stride + 1
    long_enough = []
    for episode in used:
        if episode.length >= span:
            long_enough.append(episode)
        else:
            strided = f" (a clip of {clip_length}, every {frame_stride}th)" if frame_stride > 1 else ""
            refuse(DataError(episode.source, f"has {episode.length} frames, needs {span}{strided}"))
    if not long_enough:
        reasons = Counter(reason for _, reason in skipped).most_common(3)
        raise DataError(
            str(path),
            f"nothing to read: {len(found)} usable episodes, {len(used)} of them in split {split!r}, {len(skipped)} "
            f"skipped {[f'{n} x {reason}' for reason, n in reasons]}",
        )
    return ClipDataset(
        reader,
        long_enough,
        skipped,
        clip_length,
        size=(size[0], size[1]) if size else None,
        frame_stride=frame_stride,
        clip_stride=clip_stride,
        num_actions=num_actions,
        fps=description.get("fps"),
        others=others,
    )


def _unlike(episode: Episode, first: Episode | None, size: tuple[int, int] | None) -> str:
    """Why an episode does not go together with the first one, or with the size asked for; or ""."""
    if size is not None and episode.dtype != "uint8":
        return f"size={tuple(size)} resizes images only, frames are {episode.dtype} latents"
    if first is None:
        return ""
    if episode.dtype != first.dtype:
        return f"frames are {episode.dtype}, those of {first.source} are {first.dtype}"
    shown = slice(2, 3) if size is not None else slice(0, 3)
    if episode.frame_shape[shown] != first.frame_shape[shown]:
        hint = "" if size is not None else "; give a size to resize both"
        return f"frames are {episode.frame_shape}, those of {first.source} are {first.frame_shape}{hint}"
    if episode.action_kind != first.action_kind:
        return f"has {episode.action_kind}, {first.source} has {first.action_kind}"
    return ""


def collate(clips: Sequence[Clip]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Clips -> frames (B, T, Y, X, C), and actions (B, T) int64 or (B, T, A) float32, or None."""
    frames = torch.from_numpy(np.stack([clip.frames for clip in clips]))
    actions = [clip.actions for clip in clips if clip.actions is not None]
    if not actions:
        return frames, None
    if len(actions) != len(clips):
        raise ValueError(f"clips: all or none must have actions, got {len(actions)} of {len(clips)}")
    return frames, torch.from_numpy(np.stack(actions))
