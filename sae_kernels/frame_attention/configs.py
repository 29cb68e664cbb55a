"""Launch configurations of frame_attention, a pure function of architecture, dtype, head dim and block size."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .. import _configs

ATTENTION_DIRECTIONS = ("fwd", "dkdv", "dq", "delta")


@dataclass(frozen=True)
class AttentionConfig:
    """block_m rows (queries) by block_n keys in a tile.

    With `descriptors` tiles are read through tensor descriptors by the copy engine of sm_90 and newer, where the
    strides allow it; elsewhere, and without, through pointers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    def __post_init__(self) -> None:
        _configs.check_powers_of_two(self, "block_m", "block_n", "num_warps")


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
    """The features that a configuration depends on; of the block, only whether it fills a 128-row tile."""
    return architecture, str(dtype).removeprefix("torch."), _width(head_dim), block_tokens < 128, direction


ATTENTION_KEY = ("architecture", "dtype", "width", "small_blocks", "direction")


def _width(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _default(
    architecture: int, dtype: torch.dtype, head_dim: int, block_tokens: int, direction: str
) -> AttentionConfig:
    """Sizes follow from what must fit; the compile gate checks shared memory and registers of every entry."""
    if direction == "delta":
        return AttentionConfig(64, 16, 4, 1)
    width = max(64, _width(head_dim))
    if dtype == torch.float32:
        return _FLOAT32[direction, width]
    hopper = 90 <= architecture < 120
    # A block of less than 128 tokens leaves most of a 128-row tile's own-block keys masked: 64-row tiles halve that.
    return (_HOPPER if hopper else _PORTABLE)[direction, width, block_tokens < 128]


# 227 KB of shared memory. A warpgroup instruction has 64 rows, so block_m is 64 (one warpgroup, 4 warps) or 128 (two).
# Forward: head dim 64 has room for three stages of 128 keys (112 KB), 128 for two (160 KB), 256 for two of 64 (192 KB).
# dk/dv: two fp32 accumulators [block_n, D] take half of the registers; 64 rows x 128 keys at D = 128 spill in 13 of
# the loop's 494 instructions, yet halve the shared-memory reads of the spill-free 32 x 128.
# Descriptors: decided by counting sm_90 instructions, pointers -> descriptors, not yet by the clock. Forward at D = 128
# has 569 -> 525 in the loop over full tiles and 1479 -> 894 over masked ones, 25 -> 0 of them spills. dk/dv too has
# fewer (494 -> 461, 693 -> 639), but spills up to 336 bytes under Triton 3.6: pointers. Each descriptor costs the host
# an encoding at every launch, which a CUDA graph records once. sm_120 with them spills up to 1.7 KB: pointers.
_HOPPER = {
    ("fwd", 64, False): AttentionConfig(128, 128, 8, 3, True),
    ("fwd", 64, True): AttentionConfig(64, 64, 4, 3, True),
    ("fwd", 128, False): AttentionConfig(128, 128, 8, 2, True),
    ("fwd", 128, True): AttentionConfig(64, 64, 4, 2, True),
    ("fwd", 256, False): AttentionConfig(128, 64, 8, 2, True),
    ("fwd", 256, True): AttentionConfig(128, 64, 8, 2, True),
    ("dkdv", 64, False): AttentionConfig(64, 128, 8, 3),
    ("dkdv", 64, True): AttentionConfig(64, 64, 4, 3),
    ("dkdv", 128, False): AttentionConfig(64, 128, 8, 2),
    ("dkdv", 128, True): AttentionConfig(32, 64, 4, 2),
    ("dkdv", 256, False): AttentionConfig(32, 64, 8, 2),
    ("dkdv", 256, True): AttentionConfig(32, 64, 8, 2),
    ("dq", 64, False): AttentionConfig(128, 64, 8, 3, True),
    ("dq", 64, True): AttentionConfig(64, 64, 4, 3, True),
    ("dq", 128, False): AttentionConfig(128, 64, 8, 2, True),
    ("dq", 128, True): AttentionConfig(64, 64, 4, 2, True),
    ("dq", 256, False): AttentionConfig(64, 32, 8, 2, True),
    ("dq", 256, True): AttentionConfig(64, 32, 8, 2, True),
}
# Everything else, sm_80 to sm_120: fits the 99 KB of sm_86, sm_89 and sm_120, and spills at most 96 bytes.
_PORTABLE = {
    ("fwd", 64, False): AttentionConfig(128, 128, 8, 2),
    ("fwd", 64, True): AttentionConfig(64, 64, 4, 3),
    ("fwd", 128, False): AttentionConfig(128, 64, 8, 2),
    ("fwd", 128, True): AttentionConfig(64, 64, 4, 2),
    ("fwd", 256, False): AttentionConfig(64, 32, 8, 2),
    ("fwd", 256, True): AttentionConfig(64, 32, 8, 2),
    ("dkdv", 64, False): AttentionConfig(64, 128, 8, 2),
    ("dkdv", 64, True): AttentionConfig(64, 64, 4, 2),
    ("dkdv", 128, False): AttentionConfig(32, 128, 8, 2),
    ("dkdv", 128, True): AttentionConfig(32, 64, 4, 2),
    ("dkdv", 256, False): AttentionConfig(16, 64, 8, 1),
    ("dkdv", 256, True): AttentionConfig(16, 64, 8, 1),
    ("dq", 64, False): AttentionConfig(128, 64, 8, 2),
    ("dq", 64, True): AttentionConfig(64, 64, 4, 2),
    ("dq", 128, False): AttentionConfig(64, 64, 4, 2),
    ("dq", 128, True): AttentionConfig(64, 64, 4, 2),
    ("dq", 256, False): AttentionConfig(64, 32, 8, 1),
    ("dq", 256, True): AttentionConfig(64, 32, 8, 1),
}
# True fp32 products use the ordinary cores with operands in registers; larger tiles spill kilobytes.
_FLOAT32 = {
    ("fwd", 64): AttentionConfig(32, 32, 4, 1),
    ("fwd", 128): AttentionConfig(32, 32, 8, 1),
    ("fwd", 256): AttentionConfig(16, 16, 8, 1),
    ("dkdv", 64): AttentionConfig(32, 32, 8, 1),
    ("dkdv", 128): AttentionConfig(16, 32, 8, 1),
    ("dkdv", 256): AttentionConfig(16, 16, 8, 1),
    ("dq", 64): AttentionConfig(32, 32, 4, 1),
    ("dq", 128): AttentionConfig(32, 16, 8, 1),
    ("dq", 256): AttentionConfig(16, 16, 8, 1),
}


@functools.cache
def _measured() -> dict[tuple, AttentionConfig]:
    """A configuration written by `python -m sae_kernels.tune`."""
    entries = _configs.measured("frame_attention")
    return {tuple(e[name] for name in ATTENTION_KEY): AttentionConfig(**e["config"]) for e in entries}
