"""What the layers that mix frames need to know about one call of the network."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from sae_kernels import FrameLayout

from .cache import Cache
from .config import ModelConfig

ROTARY_BASE = 10000.0


class FramePass:
    """How the F frames of one call are related: their streams, absolute positions, noise levels and cache.

    Args:
        config: of the network.
        mode: "sequence", clean stream then noisy copies, as in training; "spatial", every frame by itself;
            "prefill", clean frames appended to the cache; "denoise", one noisy block after the cache; "flight",
            several of them, causal among themselves.
        frames: frames of one stream.
        c_noise: (B, F), ln(sigma) / 4.
        noisy_copies: K of a sequence.
        cache: for prefill, denoise and flight.
    """

    def __init__(
        self,
        config: ModelConfig,
        mode: str,
        frames: int,
        c_noise: Tensor,
        *,
        noisy_copies: int = 0,
        cache: Cache | None = None,
    ) -> None:
        self.config = config
        self.mode = mode
        self.frames = frames
        self.c_noise = c_noise
        self.noisy_copies = noisy_copies
        self.cache = cast(Cache, cache)
        # Position of the first frame.
        self.start = 0 if cache is None else cache.frames
        # A frame's clean and noisy copies share its position.
        self.positions = (self.start + torch.arange(frames, device=c_noise.device)).repeat(1 + noisy_copies)

    def layout(self, tokens_per_frame: int) -> FrameLayout:
        return FrameLayout(
            self.frames,
            tokens_per_frame,
            frames_per_block=self.config.frames_per_block,
            noisy_copies=self.noisy_copies,
            window=self.config.window,
            sink=self.config.sink,
        )
