"""What sampling keeps of the clean frames so far: convolution inputs, past terms, rotated keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import ModelConfig

# Time before frame 0 is a constant one in every channel, in training and in sampling.
PAD_VALUE = 1.0


class ConvEntry:
    """The last kt - 1 clean input frames of one convolution, and the past term of the next frame.

    history: (B, C, kt - 1, Y, X) channels_last_3d.
    """

    def __init__(self, x: Tensor, kernel_frames: int) -> None:
        B, C, _, Y, X = x.shape
        self.history = x.new_full((B, kernel_frames - 1, Y, X, C), PAD_VALUE).permute(0, 4, 1, 2, 3)
        self._past: Tensor | None = None

    def past(self, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(history)`, at most once between two appends."""
        if self._past is None:
            self._past = compute(self.history)
        return self._past

    def append(self, x: Tensor) -> None:
        """Add clean input frames (B, C, n, Y, X)."""
        keep = self.history.shape[2]
        if x.shape[2] >= keep:
            self.history.copy_(x[:, :, x.shape[2] - keep :])
        else:
            self.history = torch.cat((self.history[:, :, x.shape[2] :], x), dim=2)
        self._past = None


class AttentionEntry:
    """Rotated keys and values of one temporal attention, in slots of one block each.

    Attention does not depend on the order of its keys, so the visible slots are always 0 .. n - 1, and the block being
    denoised uses slot n: its keys are written there and one dense attention reads slots 0 .. n in place. With a window,
    n <= sink + window: the sink's slots, then a ring. Without one, the buffers double when they are full.

    keys, values: (B, H, slots * block_tokens, D).
    """

    def __init__(self, k: Tensor, block_tokens: int, window: int | None, sink: int) -> None:
        self.block_tokens = block_tokens
        self.window = window
        self.sink = sink
        # There is always room for the working block after the visible slots.
        slots = 4 if window is None else sink + window + 1
        B, H, _, D = k.shape
        self.keys = k.new_empty(B, H, slots * block_tokens, D)
        self.values = torch.empty_like(self.keys)

    def visible(self, blocks: int) -> int:
        """Slots in use, all visible to the next block, after `blocks` blocks."""
        return blocks if self.window is None else min(blocks, self.sink + self.window)

    def with_own(self, blocks: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the working block's k and v (B, H, n, D) after the visible slots; return both together, as views."""
        start = self.visible(blocks) * self.block_tokens
        end = start + k.shape[2]
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]

    def in_flight(self, blocks: int, own: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that working block `own` sees: cached ones, and those of working blocks up to itself.

        k, v: (B, H, n * block_tokens, D) of the working blocks, the first being block number `blocks`. Stores nothing.
        """
        size = self.block_tokens
        if self.window is None:
            slots, working = list(range(blocks)), list(range(own + 1))
        else:
            oldest = max(blocks + own - self.window, 0)
            slots = list(range(min(self.sink, blocks)))
            slots += [self.sink + (b - self.sink) % self.window for b in range(max(self.sink, oldest), blocks)]
            working = [i for i in range(own + 1) if i == own or blocks + i >= oldest or blocks + i < self.sink]

        def seen(cached: Tensor, new: Tensor) -> Tensor:
            parts = _slots(cached, sorted(slots), size), _slots(new, working, size)
            return torch.cat(parts, dim=2)

        return seen(self.keys, k), seen(self.values, v)

    def append(self, blocks: int, k: Tensor, v: Tensor) -> None:
        """Add whole clean blocks, the first being block number `blocks`. k, v: (B, H, n * block_tokens, D)."""
        size = self.block_tokens
        count = k.shape[2] // size
        if self.window is None:
            self._reserve(blocks + count + 1)
            self.keys[:, :, blocks * size : (blocks + count) * size] = k
            self.values[:, :, blocks * size : (blocks + count) * size] = v
            return
        for i in range(count):
            block = blocks + i
            if block < self.sink:
                slot = block
            elif block >= blocks + count - self.window:
                slot = self.sink + (block - self.sink) % self.window
            else:
                continue  # no later block sees it
            self.keys[:, :, slot * size : (slot + 1) * size] = k[:, :, i * size : (i + 1) * size]
            self.values[:, :, slot * size : (slot + 1) * size] = v[:, :, i * size : (i + 1) * size]

    def _reserve(self, slots: int) -> None:
        have = self.keys.shape[2] // self.block_tokens
        if slots <= have:
            return
        B, H, _, D = self.keys.shape
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(B, H, max(slots, 2 * have) * self.block_tokens, D)
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)


def _slots(x: Tensor, slots: list[int], size: int) -> Tensor:
    """Slots of `size` tokens of (B, H, n, D); a view if they are consecutive."""
    if not slots or slots == list(range(slots[0], slots[-1] + 1)):
        return x[:, :, slots[0] * size : (slots[-1] + 1) * size] if slots else x[:, :, :0]
    return torch.cat([x[:, :, slot * size : (slot + 1) * size] for slot in slots], dim=2)


class Cache:
    """The clean frames that a `Denoiser` has been given, as its layers need them.

    Made by `Denoiser.new_cache`, filled by `Denoiser.prefill`, read by `Denoiser.denoise`. It is valid only for the
    weights it was filled with. Entries are keyed by the layer's path in the network. With a window its size is bounded.

    Attributes:
        batch: B.
        frames: clean frames appended so far; the next frame has this position.
        last: the last of them (B, C, Y, X) and its noise level (B,), for a prior that is built on it.
    """

    def __init__(self, config: ModelConfig, batch: int) -> None:
        self.config = config
        self.batch = batch
        self.frames = 0
        self.last: tuple[Tensor, Tensor] | None = None
        self._conv: dict[str, ConvEntry] = {}
        self._attention: dict[str, AttentionEntry] = {}

    @property
    def blocks(self) -> int:
        return self.frames // self.config.frames_per_block

    def conv(self, key: str, x: Tensor) -> ConvEntry:
        """The entry of the convolution at path `key`, created on first use for inputs like x (B, C, F, Y, X)."""
        if key not in self._conv:
            self._conv[key] = ConvEntry(x, self.config.kernel_frames)
        return self._conv[key]

    def attention(self, key: str, k: Tensor, tokens_per_frame: int) -> AttentionEntry:
        """The entry of the attention at path `key`, created on first use for keys like k (B, H, n, D)."""
        if key not in self._attention:
            block_tokens = self.config.frames_per_block * tokens_per_frame
            self._attention[key] = AttentionEntry(k, block_tokens, self.config.window, self.config.sink)
        return self._attention[key]

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by path, not copied; past terms are left out."""
        found = {f"{key}.history": entry.history for key, entry in self._conv.items()}
        for key, entry in self._attention.items():
            found |= {f"{key}.keys": entry.keys, f"{key}.values": entry.values}
        if self.last is not None:
            found |= {"last.frame": self.last[0], "last.sigma": self.last[1]}
        return found

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())
