"""Progress and remaining time of a long command: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EVERY = 5.0  # seconds between two lines where there is no terminal


class Progress:
    """Writes to stderr. What was done before (`start`) does not count towards rate and remaining time."""

    def __init__(self, name: str, total: int, unit: str, *, start: int = 0) -> None:
        self.name, self.total, self.unit, self.start = name, total, unit, start
        self.done, self.note = float(start), ""
        self._began = self._written = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn
            from rich.progress import Progress as Bar

            self._bar = Bar("{task.description}", BarColumn(), "{task.fields[text]}", console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total, completed=start, text="")
            self._bar.start()

    def update(self, done: float, note: str | None = None, *, left: float | None = None, now: bool = False) -> None:
        """Show `done` of the total; `note` is shown beside it until it is replaced.

        Args:
            left: remaining seconds, if the caller knows better than the mean rate so far.
            now: write a line even if one was written just before.
        """
        self.done, self.note = done, self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=self.text(left))
        elif now or time.monotonic() - self._written >= EVERY:
            print(f"{self.name} {self.text(left)}", file=sys.stderr, flush=True)
            self._written = time.monotonic()

    def text(self, left: float | None = None) -> str:
        elapsed = time.monotonic() - self._began
        if left is None and self.done > self.start:
            left = elapsed / (self.done - self.start) * (self.total - self.done)
        parts = [f"{int(self.done)}/{self.total} {self.unit}", self.note, f"{clock(elapsed)} elapsed"]
        return ", ".join([part for part in parts if part] + ([f"{clock(left)} left"] if left is not None else []))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """ "1:02:03", or "2:03" below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def progress_bar(name: str, total: int, unit: str) -> Iterator[Progress]:
    """A `Progress` that is closed at the end."""
    progress = Progress(name, total, unit)
    try:
        yield progress
    finally:
        progress.close()
