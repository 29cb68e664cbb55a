"""One process at a time in a folder."""

from __future__ import annotations

import os
import warnings
import weakref
from pathlib import Path

_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """Only one holder of a folder at a time; the lock goes with the process, however that ends.

    A lock on the open folder itself, of which nothing is left on the disk. Children made by a fork do not hold it, so
    it ends with its process though a data loader's outlives that. Windows has no such lock; there nothing is held.

    Args:
        folder: made if it is not there.
        doing: what the holder does, for the message, such as "training in".
    """

    def __init__(self, folder: str | os.PathLike[str], doing: str) -> None:
        self.folder, self.doing = Path(folder), doing
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take it; nothing happens if this object has it.

        Raises:
            RuntimeError: another process has it, or another object of this one; the message names folder and process.
        """
        try:
            import fcntl
        except ImportError:
            return
        if self._handle is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(os.fstat(handle).st_ino)
            os.close(handle)
            raise RuntimeError(f"{self.folder}: another process{holder} is {self.doing} this folder") from error
        except OSError as error:  # some network file systems
            warnings.warn(f"{self.folder}: cannot be locked ({error}); see that only one process writes", stacklevel=2)
        self._handle = handle
        _held.add(self)

    def release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def _holder(inode: int) -> str:
    """ " (123)", the process that has a lock on the inode, where Linux says it."""
    try:
        lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
        found = {words[4] for words in lines if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode)}
    except (OSError, ValueError, IndexError):
        return ""
    found.discard("0")  # a process of another container
    return f" ({found.pop()})" if len(found) == 1 else ""


def _release_all() -> None:
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)
