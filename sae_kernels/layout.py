"""The geometry of a sequence of clean and noisy frames: which frame sees which, in integers.

A training sequence holds a clean copy of a clip and K noisy copies of it. `FrameLayout` says where each token is and
what it may attend to; every op takes a layout, and none takes a mask tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FrameLayout:
    """Geometry of one sequence of (1 + K) streams x T frames x P tokens, token fastest.

    Blocks of `frames_per_block` frames are denoised jointly (the last block may be short). A clean block i sees clean
    blocks j <= i. A noisy block i of copy k sees clean blocks j < i and noisy block i of copy k. With a window w, a
    block i sees another block j only if j >= i - w or j < sink. Inside a visible block every token sees every token.

    Args:
        frames: T, frames in the clip, at least 1.
        tokens_per_frame: P, tokens in a frame, at least 1.
        frames_per_block: frames denoised jointly, at least 1.
        noisy_copies: K, noisy copies that share the clean one; 0 is the plain block-causal sequence.
        noisy_first: the order in memory is noisy 1..K, clean instead of clean, noisy 1..K.
        window: number of preceding blocks that a block may see besides its own; None for all.
        sink: number of first blocks that stay visible, however far back.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    frames: int
    tokens_per_frame: int
    frames_per_block: int = 1
    noisy_copies: int = 1
    noisy_first: bool = False
    window: int | None = None
    sink: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("frames", 1),
            ("tokens_per_frame", 1),
            ("frames_per_block", 1),
            ("noisy_copies", 0),
            ("sink", 0),
        ):
            _check_integer(name, getattr(self, name), least)
        if self.window is not None:
            _check_integer("window", self.window, 0)
        if not isinstance(self.noisy_first, bool):
            raise ValueError(f"noisy_first: must be True or False, got {self.noisy_first!r}")

    @property
    def streams(self) -> int:
        """1 + K."""
        return 1 + self.noisy_copies

    @property
    def total_frames(self) -> int:
        """F = (1 + K) T."""
        return self.streams * self.frames

    @property
    def sequence_length(self) -> int:
        """S = F P."""
        return self.total_frames * self.tokens_per_frame

    @property
    def num_blocks(self) -> int:
        return -(-self.frames // self.frames_per_block)

    @property
    def clean_start(self) -> int:
        """Frame index at which the clean stream begins."""
        return self.noisy_copies * self.frames if self.noisy_first else 0

    @property
    def noisy_start(self) -> int:
        """Frame index at which the first noisy stream begins."""
        return 0 if self.noisy_first else self.frames

    @property
    def attended_pairs(self) -> int:
        """Exact number of visible (query token, key token) pairs."""
        total = 0
        for block in range(self.num_blocks):
            own = self.block_frames(block)
            seen = sum(self.block_frames(j) for j in range(block) if self.visible(block, j))
            total += self.streams * own * (seen + own)
        return total * self.tokens_per_frame**2

    def block_frames(self, block: int) -> int:
        """Frames in block `block`: frames_per_block, or fewer for a short last one."""
        return min(self.frames_per_block, self.frames - block * self.frames_per_block)

    def visible(self, block: int, other: int) -> bool:
        """Whether a block may look back at an earlier clean block under window and sink."""
        return other < block and (self.window is None or other >= block - self.window or other < self.sink)

    def dense_mask(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Bool (S, S), True where a query row sees a key column. For tests and small sequences: it takes S^2 bytes."""
        index = torch.arange(self.sequence_length, device=device)
        return self.mask_mod()(0, 0, index[:, None], index[None, :])

    def mask_mod(self) -> Callable:
        """The rule as a FlexAttention `mask_mod(b, h, q_idx, kv_idx)`, correct for every layout and block size."""
        T, P, f, K = self.frames, self.tokens_per_frame, self.frames_per_block, self.noisy_copies
        noisy_first, window, sink = self.noisy_first, self.window, self.sink

        def place(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """(stream, block) of a token, with stream 0 the clean one."""
            frame = index // P
            stream, block = frame // T, (frame % T) // f
            return ((stream + 1) % (K + 1) if noisy_first else stream), block

        def mask_mod(b, h, q_idx, kv_idx):
            q_stream, q_block = place(q_idx)
            k_stream, k_block = place(kv_idx)
            past = (k_stream == 0) & (k_block < q_block)
            if window is not None:
                past = past & ((k_block >= q_block - window) | (k_block < sink))
            own = (k_stream == q_stream) & (k_block == q_block)
            return past | own

        return mask_mod

    def split(self, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (clean, noisy) of x along `dim`, which counts frames (F) or tokens (S); noisy holds all K copies.

        Raises:
            ValueError: the size of the dimension is neither F nor S.
        """
        size = x.shape[dim]
        if size == self.total_frames:
            unit = 1
        elif size == self.sequence_length:
            unit = self.tokens_per_frame
        else:
            raise ValueError(
                f"x: dimension {dim} must be total_frames = {self.total_frames} or sequence_length = "
                f"{self.sequence_length}, got {size}"
            )
        clean = x.narrow(dim, self.clean_start * unit, self.frames * unit)
        noisy = x.narrow(dim, self.noisy_start * unit, self.noisy_copies * self.frames * unit)
        return clean, noisy


def _check_integer(name: str, value: object, least: int) -> None:
    # an integer is a torch.SymInt while torch.compile traces with dynamic shapes
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ValueError(f"{name}: must be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: must be >= {least}, got {value}")
