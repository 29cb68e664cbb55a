"""Training: the loop, its schedule and averages, checkpoints, and measurements on held-out clips."""

from .checkpoint import latest_checkpoint, load_denoiser
from .config import TrainConfig
from .trainer import Trainer, TrainResult

__all__ = ["TrainConfig", "TrainResult", "Trainer", "latest_checkpoint", "load_denoiser"]
