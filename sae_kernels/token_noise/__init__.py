"""Noise for every stream of a sequence from one counter-based generator, the same on every backend."""

from .api import token_noise, token_noise_eps

__all__ = ["token_noise", "token_noise_eps"]
