"""Kernels for training autoregressive video diffusion and world models."""

from .activations import modulated_silu, mp_cat, mp_silu, mp_sum, pixel_norm, pixel_norm_silu
from .causal_conv3d import causal_conv3d, past_term
from .edm_loss import edm_loss
from .frame_attention import frame_attention
from .layout import FrameLayout
from .qk_prepare import qk_prepare, qkv_prepare
from .token_noise import token_noise, token_noise_eps
from .weight_norm import normalize_weight, normalize_weights, normalize_weights_

__all__ = [
    "FrameLayout",
    "causal_conv3d",
    "edm_loss",
    "frame_attention",
    "modulated_silu",
    "mp_cat",
    "mp_silu",
    "mp_sum",
    "normalize_weight",
    "normalize_weights",
    "normalize_weights_",
    "past_term",
    "pixel_norm",
    "pixel_norm_silu",
    "qk_prepare",
    "qkv_prepare",
    "token_noise",
    "token_noise_eps",
]
__version__ = "0.1.0"
