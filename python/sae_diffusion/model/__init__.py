"""The EDM2-style U-Net over frames and its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names
from .config import ModelConfig

if TYPE_CHECKING:
    from .cache import Cache
    from .denoiser import Denoiser

__all__ = ["Cache", "Denoiser", "ModelConfig"]
__getattr__ = lazy_names(__name__, {"Cache": "cache", "Denoiser": "denoiser"})
