"""Weights of a magnitude-preserving layer of EDM2 (Karras et al. 2024): normalised in use, and by force."""

from .api import normalize_weight, normalize_weights, normalize_weights_

__all__ = ["normalize_weight", "normalize_weights", "normalize_weights_"]
