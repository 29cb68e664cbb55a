"""Causal 3D convolution whose past taps are computed once and shared by the clean and all noisy streams."""

from .api import causal_conv3d, past_term

__all__ = ["causal_conv3d", "past_term"]
