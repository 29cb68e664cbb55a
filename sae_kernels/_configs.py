"""Launch configurations as data: a pure function picks them, nothing is timed at run time.

Timing at first use would let ranks of one job pick different tilings, hence different rounding. Measured tables come
from `python -m sae_kernels.tune` and are read from the file that SAE_KERNELS_CONFIGS names. No choice depends on the
batch: a row's result does not depend on what else is in the batch.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Bytes of shared memory one program may use, by compute capability times ten.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ATTENTION_DIRECTIONS = ("fwd", "dkdv", "dq", "delta")


@dataclass(frozen=True)
class AttentionConfig:
    """block_m rows (queries) by block_n keys in a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "num_stages" and (value < 1 or value & (value - 1)):
                raise ValueError(f"{name}: must be a power of two, got {value}")


def attention_config(
    architecture: int, dtype: torch.dtype, head_dim: int, block_tokens: int, direction: str
) -> AttentionConfig:
    """The configuration of one frame_attention kernel.

    Args:
        architecture: compute capability times ten; 0 is the CPU interpreter.
        dtype: of q, k, v.
        head_dim: D.
        block_tokens: tokens of one block, frames_per_block * tokens_per_frame.
        direction: "fwd", "dkdv", "dq" or "delta".
    """
    if direction not in ATTENTION_DIRECTIONS:
        raise ValueError(f"direction: must be one of {ATTENTION_DIRECTIONS}, got {direction!r}")
    if architecture == 0:
        return AttentionConfig(32, 16, 4, 1)
    measured = _measured().get(attention_key(architecture, dtype, head_dim, block_tokens, direction))
    return measured or _default(architecture, dtype, head_dim, block_tokens, direction)


def attention_key(
    architecture: int, dtype: torch.dtype, head_dim: int, block_tokens: int, direction: str
) -> tuple[int, str, int, bool, str]:
    """What configurations are told apart by: of the block only whether it fills a 128-row tile."""
    return architecture, str(dtype).removeprefix("torch."), _width(head_dim), block_tokens < 128, direction


def _width(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _default(
    architecture: int, dtype: torch.dtype, head_dim: int, block_tokens: int, direction: str
) -> AttentionConfig:
    """Sized by what must fit; the compile gate holds every entry to shared memory and registers without spills."""
    width = _width(head_dim)
    if direction == "delta":
        return AttentionConfig(64, 16, 4, 1)
    if dtype == torch.float32:
        return _float32(width, direction)
    small_memory = SHARED_MEMORY.get(architecture, 101_376) < 160_000
    table = _SMALL if small_memory else _HOPPER if architecture >= 90 else _AMPERE
    # A block of less than 128 tokens leaves most of a 128-row tile's own-block keys masked: 64 x 64 tiles halve that.
    return table[direction, min(width, 256) if width > 64 else 64, block_tokens < 128]


# 64 rows per warpgroup instruction on sm_90, so block_m is 64 (one warpgroup, 4 warps) or 128 (two). Head dim 64 has
# room for three stages of 128 keys (98 KB); 128 for two (160 KB); 256 for two of 64 keys (192 KB). In dk/dv two fp32
# accumulators of [block_n, D] live in registers, so D = 256 takes 64 keys.
_HOPPER = {
    ("fwd", 64, False): AttentionConfig(128, 128, 8, 3),
    ("fwd", 64, True): AttentionConfig(64, 64, 4, 3),
    ("fwd", 128, False): AttentionConfig(128, 128, 8, 2),
    ("fwd", 128, True): AttentionConfig(64, 64, 4, 2),
    ("fwd", 256, False): AttentionConfig(128, 64, 8, 2),
    ("fwd", 256, True): AttentionConfig(128, 64, 8, 2),
    ("dkdv", 64, False): AttentionConfig(64, 128, 8, 3),
    ("dkdv", 64, True): AttentionConfig(64, 64, 4, 3),
    ("dkdv", 128, False): AttentionConfig(64, 128, 8, 2),
    ("dkdv", 128, True): AttentionConfig(64, 64, 4, 2),
    ("dkdv", 256, False): AttentionConfig(32, 64, 8, 2),
    ("dkdv", 256, True): AttentionConfig(32, 64, 8, 2),
    ("dq", 64, False): AttentionConfig(128, 64, 8, 3),
    ("dq", 64, True): AttentionConfig(64, 64, 4, 3),
    ("dq", 128, False): AttentionConfig(128, 64, 8, 2),
    ("dq", 128, True): AttentionConfig(64, 64, 4, 2),
    ("dq", 256, False): AttentionConfig(64, 32, 8, 2),
    ("dq", 256, True): AttentionConfig(64, 32, 8, 2),
}
_AMPERE = _HOPPER
_SMALL = _HOPPER


def _float32(width: int, direction: str) -> AttentionConfig:
    return AttentionConfig(32, 32, 4, 1)


@functools.cache
def _measured() -> dict[tuple, AttentionConfig]:
    path = os.environ.get("SAE_KERNELS_CONFIGS")
    return load_attention(Path(path)) if path else {}


def load_attention(path: Path) -> dict[tuple, AttentionConfig]:
    """Read a table that `python -m sae_kernels.tune` wrote."""
    entries = json.loads(path.read_text())["frame_attention"]
    fields = ("architecture", "dtype", "width", "small_blocks", "direction")
    return {tuple(e[f] for f in fields): AttentionConfig(**e["config"]) for e in entries}
