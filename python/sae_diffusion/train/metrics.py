"""The metrics of a run: metrics.jsonl, TensorBoard curves, and its progress."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..disk import write_text
from ..progress import Progress
from .checkpoint import naming_write_errors

FILE = "metrics.jsonl"


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line truncated by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class Reporter:
    """Writes on rank 0. Training continues from `start_step`; later records of an earlier process are dropped."""

    def __init__(self, run_dir: Path, *, start_step: int, total_steps: int, tensorboard: bool) -> None:
        self.run_dir = run_dir
        path = run_dir / FILE
        self._writer = None
        with self._naming_errors():
            run_dir.mkdir(parents=True, exist_ok=True)
            truncate_metrics(path, start_step)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self._progress = Progress("train", total_steps, "steps", start=start_step)
        self._heldout = ""

    def _naming_errors(self) -> AbstractContextManager[None]:
        return naming_write_errors(self.run_dir, "metrics")

    def advance(self, step: int, seconds_left: float) -> None:
        self._progress.update(step, left=seconds_left)

    def log(self, record: dict[str, Any], seconds_left: float) -> None:
        """Write a line of metrics.jsonl and a point of each curve."""
        with self._naming_errors():
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            if self._writer is not None:
                for name, value in record.items():
                    if name not in ("step", "clips", "seconds") and value is not None:
                        self._writer.add_scalar(name, value, record["step"])
        if "heldout_loss" in record:
            self._heldout = f", held out {record['heldout_loss']:.4f}"
        loss = record.get("loss", record.get("loss_spatial"))  # a record of spatial-only steps has only the second
        note = f"loss {loss:.4f}{self._heldout}, {record['clips_per_second']:.1f} clips/s"
        self._progress.update(record["step"], note, left=seconds_left, now=True)

    def add_image(self, name: str, image: Any, step: int) -> None:
        """Add an image (Y, X, C) uint8 beside the curves."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Force the metrics to the disk, so that they never lag behind a checkpoint."""
        with self._naming_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            with self._naming_errors():
                self._file.close()
                if self._writer is not None:
                    self._writer.close()
        finally:
            self._progress.close()
