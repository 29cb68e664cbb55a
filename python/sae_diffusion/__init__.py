"""World models on top of sae_kernels: model, diffusion, data and training.

The names below are what a Python user needs; each is imported when it is first used, so `import sae_diffusion` does not
wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy_names

if TYPE_CHECKING:
    from .data.dataset import ClipDataset, open_dataset
    from .data.episodes import Clip
    from .data.format import DataError
    from .data.record import Timing, collect
    from .data.stats import FrameStats
    from .diffusion.noise import NoiseConfig
    from .diffusion.sampler import Request, SamplerConfig, generate
    from .model.config import ModelConfig
    from .model.denoiser import Denoiser
    from .presets import PRESETS, Preset
    from .pretrained import load_pretrained
    from .rollout import Rollout, continue_clips
    from .train.checkpoint import latest_checkpoint, load_denoiser
    from .train.config import TrainConfig
    from .train.loop import TrainResult
    from .train.trainer import Trainer

__all__ = [
    "PRESETS",
    "Clip",
    "ClipDataset",
    "DataError",
    "Denoiser",
    "FrameStats",
    "ModelConfig",
    "NoiseConfig",
    "Preset",
    "Request",
    "Rollout",
    "SamplerConfig",
    "Timing",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "collect",
    "continue_clips",
    "generate",
    "latest_checkpoint",
    "load_denoiser",
    "load_pretrained",
    "open_dataset",
]

__getattr__ = lazy_names(
    __name__,
    {
        "PRESETS": "presets",
        "Clip": "data.episodes",
        "ClipDataset": "data.dataset",
        "DataError": "data.format",
        "Denoiser": "model.denoiser",
        "FrameStats": "data.stats",
        "ModelConfig": "model.config",
        "NoiseConfig": "diffusion.noise",
        "Preset": "presets",
        "Request": "diffusion.sampler",
        "Rollout": "rollout",
        "SamplerConfig": "diffusion.sampler",
        "Timing": "data.record",
        "TrainConfig": "train.config",
        "TrainResult": "train.loop",
        "Trainer": "train.trainer",
        "collect": "data.record",
        "continue_clips": "rollout",
        "generate": "diffusion.sampler",
        "latest_checkpoint": "train.checkpoint",
        "load_denoiser": "train.checkpoint",
        "load_pretrained": "pretrained",
        "open_dataset": "data.dataset",
    },
)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
