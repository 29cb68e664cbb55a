"""Magnitude-preserving pieces of EDM2 (Karras et al. 2024, "Analyzing and improving the training dynamics ...")."""

from .api import mp_cat, mp_silu, mp_sum, normalize_weight, normalize_weights_, pixel_norm

__all__ = ["mp_cat", "mp_silu", "mp_sum", "normalize_weight", "normalize_weights_", "pixel_norm"]
