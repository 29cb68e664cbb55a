"""The EDM2-style U-Net over frames and its cache."""

from .cache import Cache
from .config import ModelConfig
from .denoiser import Denoiser

__all__ = ["Cache", "Denoiser", "ModelConfig"]
