"""Magnitude-preserving pieces of EDM2 (Karras et al. 2024, "Analyzing and improving the training dynamics ...")."""

from .api import (
    modulated_silu,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_weight,
    normalize_weights,
    normalize_weights_,
    pixel_norm,
    pixel_norm_silu,
)

__all__ = [
    "modulated_silu",
    "mp_cat",
    "mp_silu",
    "mp_sum",
    "normalize_weight",
    "normalize_weights",
    "normalize_weights_",
    "pixel_norm",
    "pixel_norm_silu",
]
