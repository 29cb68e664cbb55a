"""Kernels for training autoregressive video diffusion and world models."""

from .frame_attention import frame_attention
from .layout import FrameLayout

__all__ = ["FrameLayout", "frame_attention"]
__version__ = "0.1.0"
