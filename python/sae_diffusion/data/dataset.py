"""Clips of video with actions, from recorded episodes, folders of video files, or npz files."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import Count, Fraction, check_choice, check_value
from .arrays import NpzReader
from .episodes import Clip, Episode, Reader, file_version
from .format import DataError, resize_frames
from .recorded import RecordedReader
from .videos import VIDEO_SUFFIXES, VideoReader


class ClipDataset(torch.utils.data.Dataset):
    """Clips of fixed length, made by `open_dataset`; `ds[i]` is a Clip that depends on i and the files only.

    frame_shape (Y, X, C); is_latent; num_actions (discrete, 0 = none); action_dim (continuous, 0 = none); fps or None;
    episodes; others, usable episodes outside the split; skipped, a list of (source, reason). It can be pickled, and can
    be used after a fork.
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
        # of files whose modification time changed but whose content did not
        self._versions: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def frames_of(self, episode: Episode) -> int:
        """Frames of the longest clip that an episode can give."""
        return (episode.length - 1) // self.frame_stride + 1

    def cut(self, clip_length: int, episodes: Sequence[Episode]) -> ClipDataset:
        """Clips of another length from `episodes`; those too short are left out, but one must be long enough."""
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
        """The episode of clip `index`, and the indices of the clip's frames in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: must be in [{-len(self)}, {len(self)}), got {index}")
        index %= len(self)
        which = bisect_right(self._ends, index)
        start = (index - (self._ends[which - 1] if which else 0)) * self.clip_stride
        return self.episodes[which], range(start, start + self._span, self.frame_stride)

    def __getitem__(self, index: int) -> Clip:
        episode, indices = self.locate(int(index))
        try:
            frames = self._reader.frames(episode, indices)
        finally:  # a read may have failed because the file changed
            self._check_unchanged(episode)
        wanted = (self.clip_length, *episode.frame_shape)
        if frames.shape != wanted or frames.dtype != episode.dtype:
            raise DataError(
                episode.source, f"frames must be {episode.dtype} {wanted}, got {frames.dtype} {frames.shape}"
            )
        if self.size is not None:
            frames = resize_frames(frames, self.size)
        return Clip(frames, _into_frames(episode.actions, indices), f"{episode.source}, frame {indices.start}")

    def _check_unchanged(self, episode: Episode) -> None:
        """The content decides: a file that was touched or copied, or a folder that `collect` has added to, passes.

        Raises:
            DataError: the file is gone, or its content differs from when the data set was opened.
        """
        version = file_version(episode.file)
        if version == self._versions.get(episode.source, episode.version):
            return
        found = f"{episode.version[0]} bytes then, {version[0]} now"
        try:
            same = self._reader.stamp(episode) == episode.stamp
        except Exception as error:  # a broken file can raise anything
            same, found = False, f"{found}: {error}"
        if not same:
            raise DataError(episode.source, f"has changed since it was opened ({found})")
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
    """The action that caused each frame: the one taken one stride earlier; unknown where there is no such frame."""
    if actions is None:
        return None
    if actions.ndim == 1:
        unknown: Any = np.int64(-1)
    else:
        unknown = np.full(actions.shape[1], np.nan, np.float32)
    return np.stack([actions[i - indices.step] if i >= indices.step else unknown for i in indices])


def is_heldout(identity: str, fraction: float) -> bool:
    """A draw that depends on the episode alone: adding data never moves an episode to the other split."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") < fraction * 2**64


def detect(path: Path) -> Reader:
    """The reader for a folder written by `collect`, a folder of videos or of npz files, or one such file."""
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


def scan(reader: Reader, size: tuple[int, int] | None, *, verify: bool) -> Iterator[Episode | DataError]:
    """Every episode, or the reason why it cannot be used: unreadable, or not of one kind with the first usable one.

    Args:
        size: that images will be resized to.
        verify: read all of the content.
    """
    first = None
    for file in reader.files():
        try:
            version = file_version(file)
            for episode in reader.scan(file, verify):
                if isinstance(episode, DataError):
                    yield episode
                elif problem := _unlike(episode, first, size):
                    yield DataError(episode.source, problem)
                else:
                    first = first or episode
                    yield replace(episode, version=version)
        except DataError as error:
            yield error


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
    """Open a folder written by `collect`, a folder of videos or of npz files, or one such file.

    A clip is `clip_length` frames, every `frame_stride`-th; clips start every `clip_stride` frames (default: where the
    one before ends, no overlap). With a stride, the action of a frame is the one taken at the clip's frame before it.
    `size` (Y, X) resizes images by area. `split`: "all", or "train" or "heldout" by a hash of each episode's identity.
    If a file changes afterwards, reading a clip of it is a DataError.
    What cannot be used (corrupt, of another shape, with other actions, too short) raises a DataError (a ValueError)
    that names file and reason; with on_error="skip" it is listed in `.skipped` instead. With "skip" all of the content
    is verified at once; with "raise" recorded shards are verified as they are read, everything else at once.
    """
    for name, value in (("clip_length", clip_length), ("frame_stride", frame_stride), ("clip_stride", clip_stride)):
        check_value(name, value, Count | None)
    check_choice("on_error", on_error, ("raise", "skip"))
    check_choice("split", split, ("all", "train", "heldout"))
    check_value("heldout_fraction", heldout_fraction, Fraction)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: must be (Y, X) >= 1, got {size!r}")

    reader = detect(Path(path))
    found: list[Episode] = []
    skipped: list[tuple[str, str]] = []

    def refuse(error: DataError) -> None:
        if on_error == "raise":
            raise error
        skipped.append((error.source, error.reason))

    for source in scan(reader, size, verify=on_error == "skip"):
        if isinstance(source, DataError):
            refuse(source)
        else:
            found.append(source)

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
            refuse(DataError(episode.source, f"must have at least {span} frames{strided}, got {episode.length}"))
    if not long_enough:
        reasons = Counter(reason for _, reason in skipped).most_common(3)
        raise DataError(
            str(path),
            f"nothing to read: {len(found)} usable episodes, {len(used)} of them in split {split!r}; {len(skipped)} "
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
    """Why an episode cannot be used with the first one, or with the requested size; "" if it can."""
    if size is not None and episode.dtype != "uint8":
        return f"size={tuple(size)} is for images only, frames are {episode.dtype} latents"
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
        raise ValueError(f"clips: all or none must have actions, got actions in {len(actions)} of {len(clips)}")
    return frames, torch.from_numpy(np.stack(actions))
