"""The denoising loss from the network's output, with noise made again instead of stored."""

from .api import edm_loss

__all__ = ["edm_loss"]
