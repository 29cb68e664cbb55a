"""Magnitude-preserving activations, sums and norms of EDM2 (Karras et al. 2024)."""

from .api import modulated_silu, mp_cat, mp_silu, mp_sum, pixel_norm, pixel_norm_silu

__all__ = ["modulated_silu", "mp_cat", "mp_silu", "mp_sum", "pixel_norm", "pixel_norm_silu"]
