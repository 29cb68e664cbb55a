"""`sae data check`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..checks import Count, check_fields


@dataclass(frozen=True, kw_only=True)
class DataCommand:
    """Check training data: one line for each source, and exit code 1 if any of them cannot be used.

    Args:
        task: "check", the only task.
        path: folder or file, as --data of `sae train`.
        clip_length: frames of a clip; sources too short for one clip are bad.
        frame_stride: frames from one frame of a clip to the next.
        size: height and width that images will be resized to; "None": all must have the same size.
        json: print the result as JSON.
        seed: accepted for consistency.
        device: accepted for consistency; data is read on the CPU.
        debug: show the traceback of an error.
    """

    # tyro does not show a union or a Literal with a single member
    task: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="check")]]
    path: tyro.conf.Positional[Path]
    clip_length: Count = 1
    frame_stride: Count = 1
    size: tuple[int, int] | None = None
    json: bool = False
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def run(self) -> int:
        if self.task != "check":
            raise ValueError(f"task: must be check, got {self.task!r}")
        check_fields(self)
        from .check import check_data

        good, bad, frames = 0, 0, 0
        sources: list[dict[str, Any]] = []
        for source in check_data(
            self.path, clip_length=self.clip_length, frame_stride=self.frame_stride, size=self.size
        ):
            good, bad = good + source.ok, bad + (not source.ok)
            frames += source.frames or 0 if source.ok else 0
            sources.append({"ok": source.ok, **dataclasses.asdict(source)})
            if not self.json:
                print(f"{'ok ' if source.ok else 'bad'} {source.source}: {source}", flush=True)
        if self.json:
            found = {"path": str(self.path), "good": good, "bad": bad, "frames": frames, "sources": sources}
            print(json.dumps(found, indent=1))
        else:
            print(f"{self.path}: {good} good sources of {frames} frames, {bad} bad")
        return 1 if bad or not good else 0
