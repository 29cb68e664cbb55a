"""Pixels, tiles of them, and the addresses of their taps."""

import triton
import triton.language as tl

# Where a past tap's source frame lies: back in time, in `history` below frame 0; or, mirrored, ahead in time.
BACK = tl.constexpr(0)
AHEAD = tl.constexpr(1)
INTEGERS = [
    "rows", "frames", "first_frame", "source_frames", "Y", "X", "K", "N", "streams", "clean", "chunk",
    "past_parts", "last_parts",
    "stride_wo", "stride_wt", *(f"stride_{tensor}{dim}" for tensor in "pxhzg" for dim in "bfyx"),
]  # fmt: skip


@triton.jit
def coordinates(m, frames, Y, X):
    """(batch, frame, y, x) of pixel rows."""
    image = m // (Y * X)
    pixel = m % (Y * X)
    return image // frames, image % frames, pixel // X, pixel % X


@triton.jit
def tile_of(tile, rows, frames, Y, X, BM: tl.constexpr, BF: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr):
    """(row, whether it is there, batch, frame, y, x) of a tile's BM pixels, and of its box's first (batch, .., x).

    BX = 0: the pixels follow each other in memory. Else they are a box of BF frames, BY rows and BX columns.
    """
    if BX == 0:
        m = tile * BM + tl.arange(0, BM)
        batch, i, y, x = coordinates(m, frames, Y, X)
        return m, m < rows, batch, i, y, x, 0, 0, 0, 0
    else:
        across = tl.cdiv(X, BX)
        down = tl.cdiv(Y, BY)
        deep = tl.cdiv(frames, BF)
        box_x = tile % across * BX
        box_y = tile // across % down * BY
        box_i = tile // (across * down) % deep * BF
        box_b = tile // (across * down * deep)
        r = tl.arange(0, BM)
        x = box_x + r % BX
        y = box_y + r // BX % BY
        i = box_i + r // (BX * BY)
        batch = tl.zeros([BM], tl.int32) + box_b
        there = (i < frames) & (y < Y) & (x < X)
        return ((box_b * frames + i) * Y + y) * X + x, there, batch, i, y, x, box_b, box_i, box_y, box_x


@triton.jit
def elements(value, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """An offset in units as one in elements: 32 bits save registers, and hold unless WIDE."""
    if WIDE:
        return value.to(tl.int64) * UNIT
    else:
        return (value * UNIT).to(tl.int32)


@triton.jit
def pixel_offsets(batch, frame, y, x, stride_b, stride_f, stride_y, stride_x, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Element offsets of pixels."""
    outer = batch * elements(stride_b, UNIT, WIDE) + frame * elements(stride_f, UNIT, WIDE)
    return outer + y * elements(stride_y, UNIT, WIDE) + x * elements(stride_x, UNIT, WIDE)


@triton.jit
def distance(to_ptr, from_ptr, UNIT: tl.constexpr):
    """Units from one tensor to another, for offsets from one pointer to reach both; exact, as `_unit` sees to it."""
    BYTES: tl.constexpr = to_ptr.dtype.element_ty.primitive_bitwidth // 8
    return (to_ptr.to(tl.int64) - from_ptr.to(tl.int64)) // (BYTES * UNIT)


@triton.jit
def choose(condition, a, b):
    """tl.where by arithmetic: a select of tensors loses the alignment, and with it the asynchronous copies."""
    return b + condition.to(tl.int64) * (a - b)
