"""Launch configurations of causal_conv3d, a pure function of architecture, dtype, channels and pixels."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch

from .. import _configs

CONV_DIRECTIONS = ("fwd", "dgrad", "dgrad_dot", "wgrad", "streams")


@dataclass(frozen=True)
class ConvConfig:
    """block_m rows by block_n columns of the result, block_k of the reduced dimension in a step.

    Rows are pixels and columns output channels, but for the weight gradient rows are Cout, columns Cin, and pixels
    are reduced. With `boxes` the copy engine of sm_90 and newer fetches tiles, where strides and map allow it. `parts`:
    sums that a tap pass is made of, each of which may have a program of its own; 0 for one sum over all taps.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    boxes: bool = False
    parts: int = 0

    def __post_init__(self) -> None:
        _configs.check_powers_of_two(self, "block_m", "block_n", "block_k", "num_warps")
        if self.parts < 0:
            raise ValueError(f"parts: must be >= 0, got {self.parts}")


@functools.cache
def conv_config(
    architecture: int, dtype: torch.dtype, reduced: int, produced: int, pixels: int, direction: str
) -> ConvConfig:
    """The configuration of one causal_conv3d kernel.

    Args:
        architecture: compute capability times ten; 0 is the CPU interpreter.
        dtype: of x.
        reduced, produced: channels that the GEMM sums over and makes: Cin, Cout forward, Cout, Cin in "dgrad". In
            "wgrad" Cout, Cin, the rows and columns of the result.
        pixels: Y * X.
        direction: "fwd", "dgrad", "dgrad_dot" (dgrad that also makes last_scale's gradient), "wgrad" or "streams",
            the pass over the output gradient.
    """
    if direction not in CONV_DIRECTIONS:
        raise ValueError(f"direction: must be one of {CONV_DIRECTIONS}, got {direction!r}")
    if architecture == 0:
        return ConvConfig(32, 32, 128, 4, 1) if direction == "wgrad" else ConvConfig(128, 32, 32, 4, 1)
    measured = _measured().get((*conv_key(architecture, dtype, reduced, produced, pixels), direction))
    return measured or _conv_default(architecture, dtype, reduced, produced, pixels, direction)


def _conv_default(
    architecture: int, dtype: torch.dtype, reduced: int, produced: int, pixels: int, direction: str
) -> ConvConfig:
    """Sizes follow from what must fit; the compile gate checks shared memory and registers of every entry."""
    if direction == "streams":
        # Loads and stores of whole 16-byte groups; nothing is used twice.
        return ConvConfig(32, _conv_width(produced), 16, 4, 1)
    if dtype == torch.float32:
        # Without tensor cores (unless TF32 is allowed): 64 x 64 results keep 32 accumulators a thread for each of two.
        width = 32 if direction == "dgrad_dot" else 64
        return ConvConfig(64, min(width, _conv_width(produced)), 32, 4, 2)
    stages = 4 if _configs.SHARED_MEMORY.get(architecture, 101_376) > 160_000 else 3
    # mma.sync keeps operands in registers beside the accumulators, so without wgmma (90, 100) tiles are narrower.
    widest = 128 if architecture in (90, 100) else 64
    if direction == "wgrad":
        block_m, block_n = max(64, min(_conv_width(reduced), widest)), min(_conv_width(produced), widest)
        # A step of the loop with boxes is 132 (past) or 137 instructions, with pointers 515 or 456, both 4 HGMMA: eight
        # warps issue those in 264 and 1030 cycles, and 128 x 128 x 64 products take 512. sm_120: 115 and 564.
        warps = 8 if block_m * block_n > 4096 else 4
        return ConvConfig(block_m, block_n, 64, warps, stages - 1, boxes=architecture >= 90)
    # Maps of 8 x 8 pixels and less make few tiles: 64 x 64 ones occupy four times the multiprocessors of 128 x 128.
    small = pixels < 256
    block_m = 64 if small else 128
    block_n = min(_conv_width(produced), 64 if small else widest)
    block_k = 64 if reduced % 64 == 0 else 32 if reduced > 16 else 16
    # A part of 16 steps is four times what fills the pipeline, and reads 8 times the bytes of its own sum. Maps beyond
    # 8 x 8 make tiles enough in training, and their larger ones have no registers for a third accumulator.
    parts = min(4, 9 * -(-reduced // block_k) // 16) if pixels <= 64 else 0
    # Counted in SASS for sm_90, 128 x 128 x 64: a step of the loop is 110 instructions with boxes and 226 with pointers
    # (past taps; last taps 109 and 197; dgrad 115 and 205 to 238), both 4 of them HGMMA, 2 copies of whole boxes
    # against 8 masked ones of 16 bytes a thread, 182 registers against 246 (dgrad 130 and 219); sm_120 the same but for
    # mma.sync: 124 instructions and 231. Shared memory and products are equal where boxes tile the map.
    # block_n are the rows of the transposed product: 64 in a warpgroup's instruction, 16 in a warp's.
    boxes = architecture >= 90 and block_n >= (64 if architecture in (90, 100) else 16)
    # Forward two accumulators (past and last) of block_m * block_n fp32 numbers lie in registers, 128 of 255 a thread
    # at 128 x 128 with 8 warps; dgrad has one, and with the dot product a tile of x beside it, which with pointers
    # spills beyond 64 columns with wgmma and 32 without.
    if direction == "dgrad_dot" and not boxes:
        block_n = min(block_n, widest // 2)
    return ConvConfig(block_m, block_n, block_k, 4 if small else 8, stages, boxes, parts)


def conv_key(
    architecture: int, dtype: torch.dtype, reduced: int, produced: int, pixels: int
) -> tuple[int, str, int, int, int]:
    """The features that a configuration depends on: tile width, and maps of 4 x 4, 8 x 8, 16 x 16 or more."""
    scale = sum(pixels > limit for limit in (16, 64, 255))
    return architecture, str(dtype).removeprefix("torch."), _conv_width(reduced), _conv_width(produced), scale


CONV_KEY = ("architecture", "dtype", "reduced", "produced", "map")


@functools.cache
def _measured() -> dict[tuple, ConvConfig]:
    """A configuration written by `python -m sae_kernels.tune`."""
    entries = _configs.measured("causal_conv3d")
    return {tuple(e[f] for f in (*CONV_KEY, "direction")): ConvConfig(**e["config"]) for e in entries}


@functools.cache
def conv_slower() -> dict[tuple, float]:
    """{key of Cin, Cout: time of the library route over that of the kernels}, where it was measured to be below 1."""
    entries = _configs.measured("causal_conv3d_slower")
    return {tuple(e[f] for f in CONV_KEY): e["composed_over_triton"] for e in entries}


def conv_spread(architecture: int, tiles: int, pixels: int, units: int, dot: bool) -> bool:
    """Whether the parts of a tile's sums are spread over programs. It does not change the result.

    A program each where there are fewer tiles than multiprocessors: those without a tile would stay idle. From there
    on the parts' way through memory, 8 bytes for each and every output, buys nothing. With the dot products of dgrad
    (`dot`), whose rounding knows the kernel, the map decides alone: 4 x 4 pixels make few tiles in any batch.
    """
    if dot:
        return units > 1 and pixels <= 16
    return units > 1 and tiles < _configs.MULTIPROCESSORS.get(architecture, 128)


@functools.cache
def conv_box(block_m: int, Y: int, X: int) -> tuple[int, int, int]:
    """(frames, rows, columns) of a tile of block_m pixels, powers of two: what covers 16 frames of Y x X with least.

    Of equal ones that of the fewest frames, then the squarest, whose shifted boxes overlap most. No other size decides,
    so that a network compiles one kernel for each of its resolutions.
    """
    best: tuple[int, int, int] = (block_m, 1, 1)
    best_key: tuple[float, ...] = (math.inf,)
    for log_y, log_x in itertools.product(range(block_m.bit_length()), repeat=2):
        by, bx = 1 << log_y, 1 << log_x
        bf = block_m // (by * bx)
        if 1 <= bf <= 16 and max(by, bx) <= 256:
            key = (-(-16 // bf) * -(-Y // by) * -(-X // bx), bf, by + bx, bx)
            best, best_key = min(((bf, by, bx), key), (best, best_key), key=lambda choice: choice[1])
    return best


def _conv_width(channels: int) -> int:
    """Columns of a tile: 128 if that divides the channels, else 64 or as many as needed."""
    if channels > 64 and channels % 128:
        return 64
    return min(128, max(16, 1 << (channels - 1).bit_length()))
