"""Settings that the tests of series share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_diffusion.series import Source
from sae_diffusion.series.config import ScheduleConfig, SeriesTrainConfig
from sae_diffusion.series.model import SeriesModelConfig

TINY = SeriesModelConfig(width=16, layers=1, heads=2, expansion=2)
_RUN: dict[str, Any] = {
    "source": Source(length=5), "schedule": ScheduleConfig(kind="staggered", window=2.0), "model": TINY, "steps": 12, "batch": 8,
    "warmup": 3, "checkpoint_every": 6, "log_every": 4, "tensorboard": False, "device": "cpu",
}  # fmt: skip


def tiny(folder: Path, **changes: Any) -> SeriesTrainConfig:
    """A run of folder/run that takes a moment."""
    return SeriesTrainConfig(run_dir=folder / "run", **{**_RUN, **changes})
