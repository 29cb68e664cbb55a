"""Data: recording environments, reading clips, and frames to and from the network's units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .format import DataError
    from .readers import Clip, ClipDataset, collate, open_dataset
    from .record import Collected, collect
    from .stats import FrameStats

__all__ = ["Clip", "ClipDataset", "Collected", "DataError", "FrameStats", "collate", "collect", "open_dataset"]
# The processes that record need not import torch.
__getattr__ = lazy_names(
    __name__,
    {
        "Clip": "readers",
        "ClipDataset": "readers",
        "Collected": "record",
        "DataError": "format",
        "FrameStats": "stats",
        "collate": "readers",
        "collect": "record",
        "open_dataset": "readers",
    },
)
