"""Video files, decoded with PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..disk import file_digest
from .actions import read_side_file
from .episodes import Episode
from .format import DataError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")


class VideoReader:
    """Video files, each with an optional file of actions beside it; decoded once when the data set is opened."""

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
                    raise ValueError("must have a video stream, got none")
                stream = _one_thread(container.streams.video[0])
                packets = 0
                for packet in container.demux(stream):
                    packets += packet.size > 0
                    for image in packet.decode():
                        if image.is_corrupt or image.pts is None or (times and image.pts <= times[-1]):
                            raise ValueError(f"frame {len(times)} is damaged, or its time stamp does not increase")
                        if shape not in (None, (image.height, image.width, 3)):
                            raise ValueError(f"frame {len(times)} differs in size from the first, {shape}")
                        shape = (image.height, image.width, 3)
                        times.append(image.pts)
                if packets < stream.frames:
                    raise ValueError(f"truncated: has {packets} of {stream.frames} frames")
            if shape is None:
                raise ValueError("must have frames, got none")
            digest = file_digest(file)
        except Exception as error:  # PyAV's errors share no base class
            raise DataError(file, f"unreadable video: {error!r}") from error
        actions = read_side_file(file, len(times))
        identity = file.relative_to(self.root).as_posix()
        key = np.array(times, np.int64)
        yield Episode(str(file), identity, digest, file, key, len(times), shape, "uint8", actions)

    def frames(self, episode: Episode, indices: range) -> np.ndarray:
        wanted = [int(t) for t in episode.key[indices.start : indices.stop : indices.step]]
        reason = "some frames are missing that were there when it was opened"
        for seek in (wanted[0], None):  # from the key frame before the clip, else from the start
            found: list[np.ndarray] = []
            try:
                found = _decode(episode.file, wanted, seek)
            except Exception as error:  # only its text: its traceback would keep decoder and frames alive
                reason = f"unreadable video: {error!r}"
            if len(found) == len(wanted):
                return np.stack(found)
        raise DataError(episode.source, reason)

    def stamp(self, episode: Episode) -> str:
        return file_digest(episode.file)


def _decode(file: Path, times: list[int], seek: int | None) -> list[np.ndarray]:
    """The frames at `times`, up to the first that is missing."""
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
    """One thread, because freeing a threaded decoder in a forked child hangs (an exception can keep one alive)."""
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream
