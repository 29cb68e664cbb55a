"""Data: recording environments, reading clips, and frames to and from the network's units.

Names are imported when first used, so that the processes that record need not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .format import DataError
    from .readers import Clip, ClipDataset, collate, open_dataset
    from .record import Collected, collect
    from .stats import FrameStats

_HOME = {
    "Clip": "readers",
    "ClipDataset": "readers",
    "Collected": "record",
    "DataError": "format",
    "FrameStats": "stats",
    "collate": "readers",
    "collect": "record",
    "open_dataset": "readers",
}
__all__ = [
    "Clip",
    "ClipDataset",
    "Collected",
    "DataError",
    "FrameStats",
    "collate",
    "collect",
    "open_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
