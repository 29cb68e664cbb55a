"""Attention over a clean and K noisy copies of a clip, with the block-sparse mask of `FrameLayout`."""

from .api import frame_attention

__all__ = ["frame_attention"]
