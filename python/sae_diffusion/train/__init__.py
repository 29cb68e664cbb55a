"""Training: the loop, its schedule and averages, checkpoints, and measurements on held-out clips."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names
from .config import TrainConfig

if TYPE_CHECKING:
    from .checkpoint import latest_checkpoint, load_denoiser
    from .loop import TrainResult
    from .trainer import Trainer

__all__ = ["TrainConfig", "TrainResult", "Trainer", "latest_checkpoint", "load_denoiser"]
__getattr__ = lazy_names(
    __name__,
    {
        "TrainResult": "loop",
        "Trainer": "trainer",
        "latest_checkpoint": "checkpoint",
        "load_denoiser": "checkpoint",
    },
)
