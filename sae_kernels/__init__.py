"""Kernels for training autoregressive video diffusion and world models."""

from .layout import FrameLayout

__all__ = ["FrameLayout"]
__version__ = "0.1.0"
