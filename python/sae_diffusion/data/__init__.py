"""Data: recording environments, reading clips, and converting frames to and from the network's units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .dataset import ClipDataset, collate, open_dataset
    from .episodes import Clip
    from .format import DataError
    from .record import Collected, Timing, collect
    from .stats import FrameStats

__all__ = [
    "Clip",
    "ClipDataset",
    "Collected",
    "DataError",
    "FrameStats",
    "Timing",
    "collate",
    "collect",
    "open_dataset",
]
# Lazy, so that processes that record do not import torch.
__getattr__ = lazy_names(
    __name__,
    {
        "Clip": "episodes",
        "ClipDataset": "dataset",
        "Collected": "record",
        "DataError": "format",
        "FrameStats": "stats",
        "Timing": "record",
        "collate": "dataset",
        "collect": "record",
        "open_dataset": "dataset",
    },
)
