"""One process at a time in a folder."""

from __future__ import annotations

import os
import warnings
import weakref
from pathlib import Path

_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """Lets only one process use a folder at a time; the lock ends with the process, however that ends.

    The open folder itself is locked, so no file is left on the disk. Forked children do not hold the lock: it ends with
    its process even if a data loader outlives that. Windows has no such lock; there nothing is locked.

    Args:
        folder: created if it does not exist.
        doing: what the process does, for the error message, such as "training in".
    """

    def __init__(self, folder: str | os.PathLike[str], doing: str) -> None:
        self.folder, self.doing = Path(folder), doing
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock; does nothing if this object holds it already.

        Raises:
            RuntimeError: another process holds it, or another object in this one; the message names folder and process.
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
            warnings.warn(
                f"{self.folder}: cannot be locked ({error}); make sure that only one process writes there", stacklevel=2
            )
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
    """ " (123)", the process that holds a lock on the inode, or "" where Linux does not tell."""
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
