"""The network on library calls: its two ops replaced, everything else shared. No copy of the model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sae_diffusion.model import attention as model_attention
from sae_diffusion.model import conv as model_conv

from sae_kernels import FrameLayout

from . import convolution


@contextlib.contextmanager
def swapped(conv: Callable[..., torch.Tensor], attention: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, the model calls `conv` for causal_conv3d and `attention` for frame_attention."""
    places = ((model_conv, "causal_conv3d", conv), (model_attention, "frame_attention", attention))
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before):
            setattr(module, name, value)


def as_conv(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """One of `convolution`'s contenders with the signature of causal_conv3d."""

    def conv(x, weight, layout, *, past_scale=None, last_scale=None, history=None, pad_value=0.0, impl="auto"):
        if torch.is_autocast_enabled(x.device.type):
            # Its library convolutions cast themselves; scales would promote the sum.
            dtype = torch.get_autocast_dtype(x.device.type)
            past_scale, last_scale = (None if s is None else s.to(dtype) for s in (past_scale, last_scale))
        return function(x, weight, layout, past_scale, last_scale, history, pad_value)

    return conv


@functools.lru_cache(maxsize=8)
def _dense_mask(layout: FrameLayout, device: torch.device) -> torch.Tensor:
    return layout.dense_mask(device)


def dense_attention(q, k, v, layout: FrameLayout, *, impl: str = "auto") -> torch.Tensor:
    """SDPA with the S x S mask, which is made once and kept."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_dense_mask(layout, q.device))


@functools.lru_cache(maxsize=8)
def _flex(layout: FrameLayout, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    S = layout.sequence_length
    mask = create_block_mask(layout.mask_mod(), None, None, S, S, device=device)
    return torch.compile(flex_attention, dynamic=False), mask


def flex_attention(q, k, v, layout: FrameLayout, *, impl: str = "auto") -> torch.Tensor:
    """Compiled FlexAttention with the right block mask at every frame size, made once and kept."""
    compiled, mask = _flex(layout, q.device)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    return compiled(q, k, v, block_mask=mask)


def forget() -> None:
    """Drop kept masks and compiled functions, as between cases."""
    _dense_mask.cache_clear()
    _flex.cache_clear()


TWO_PASSES = as_conv(convolution.two_passes)
REFERENCE_SEQUENCE = as_conv(convolution.reference_sequence)


def routes(device: str) -> dict[str, tuple[Callable, Callable]]:
    """The networks to compare with: name -> (convolution, attention)."""
    found = {
        "separate past taps, dense mask": (TWO_PASSES, dense_attention),
        "reference sequence, dense mask": (REFERENCE_SEQUENCE, dense_attention),
    }
    if device == "cuda":
        found["reference sequence, FlexAttention"] = (REFERENCE_SEQUENCE, flex_attention)
    return found
