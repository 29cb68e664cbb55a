"""Kernels for training autoregressive video diffusion and world models."""

from .causal_conv3d import causal_conv3d, past_term
from .frame_attention import frame_attention
from .layout import FrameLayout

__all__ = ["FrameLayout", "causal_conv3d", "frame_attention", "past_term"]
__version__ = "0.1.0"
