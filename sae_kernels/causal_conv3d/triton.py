"""The shared-past convolution in Triton: implicit GEMM over channels-last video, nothing padded, stacked or duplicated.

A tap's operand is the video itself, read at shifted pixels. A program owns a tile of pixels (of one or several clean
frames) and of output channels: it accumulates the past taps once, then every stream's last taps, and combines
`out = last_scale * last + past_scale * past` in fp32. The data gradient is the same kernel with the taps mirrored: past
taps act on S = sum over streams of past_scale * grad, formed in one pass, last taps on each stream's own gradient. The
weight gradient is one GEMM over pixels for each tap, past taps again on S, split over pixels into fp32 parts that are
summed in a fixed order. No atomics; nothing depends on the batch but the split of the weight gradient.

Boxes (sm_90 and newer): a tile is a box of frames x rows x columns, and a tap's operand that box, shifted, which the
copy engine fetches with zeros beyond the map and the clip; no address or mask per pixel. A row's sum is the same, in
the same order, with and without. Parts: on small maps of many channels a tap pass is summed in a fixed number of parts,
which one program adds up in turn, or which programs of their own sum where tiles are too few: the same numbers.

The frames before frame 0 are `history`, or one row of `pad_value` that is read with stride 0.
K reduced and N output channels of a GEMM, rows its pixels; strides count units of 16 bytes (or of 1 element).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .._launch import Launch, architecture, run
from ..layout import FrameLayout
from . import configs as defaults

# Where a past tap's source frame lies: back in time, in `history` below frame 0; or, mirrored, ahead in time.
BACK = tl.constexpr(0)
AHEAD = tl.constexpr(1)

_INTEGERS = [
    "rows", "frames", "first_frame", "source_frames", "Y", "X", "K", "N", "streams", "clean", "chunk",
    "past_parts", "last_parts",
    "stride_wo", "stride_wt", *(f"stride_{tensor}{dim}" for tensor in "pxhzg" for dim in "bfyx"),
]  # fmt: skip


@triton.jit
def _pixels(m, frames, Y, X):
    """(batch, frame, y, x) of pixel rows."""
    image = m // (Y * X)
    pixel = m % (Y * X)
    return image // frames, image % frames, pixel // X, pixel % X


@triton.jit
def _tile(tile, rows, frames, Y, X, BM: tl.constexpr, BF: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr):
    """(row, whether it is there, batch, frame, y, x) of a tile's BM pixels, and of its box's first (batch, .., x).

    BX = 0: the pixels follow each other in memory. Else they are a box of BF frames, BY rows and BX columns.
    """
    if BX == 0:
        m = tile * BM + tl.arange(0, BM)
        batch, i, y, x = _pixels(m, frames, Y, X)
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
def _index(value, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """An offset in units as one in elements: 32 bits save registers, and hold unless WIDE."""
    if WIDE:
        return value.to(tl.int64) * UNIT
    else:
        return (value * UNIT).to(tl.int32)


@triton.jit
def _rows(batch, frame, y, x, stride_b, stride_f, stride_y, stride_x, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Element offsets of pixels."""
    outer = batch * _index(stride_b, UNIT, WIDE) + frame * _index(stride_f, UNIT, WIDE)
    return outer + y * _index(stride_y, UNIT, WIDE) + x * _index(stride_x, UNIT, WIDE)


@triton.jit
def _distance(to_ptr, from_ptr, UNIT: tl.constexpr):
    """Units from one tensor to another, for offsets from one pointer to reach both; exact, as `_unit` sees to it."""
    BYTES: tl.constexpr = to_ptr.dtype.element_ty.primitive_bitwidth // 8
    return (to_ptr.to(tl.int64) - from_ptr.to(tl.int64)) // (BYTES * UNIT)


@triton.jit
def _choose(condition, a, b):
    """tl.where by arithmetic: a select of tensors loses the alignment, and with it the asynchronous copies."""
    return b + condition.to(tl.int64) * (a - b)


@triton.jit
def _accumulate(
    acc, begin, end, p_ptr, source, h_from_p, history, frame, y, x, row_ok, w_ptr, n, source_frames, Y, X, K, N,
    stride_f, stride_y, stride_x, stride_hf, stride_hy, stride_hx, stride_wo, stride_wt,
    PAST: tl.constexpr, HISTORY: tl.constexpr, KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
    DIRECTION: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + sum over steps begin..end of past (or last) taps by K channels of source pixel times weight.

    HISTORY: only of the frames that lie there, with p_ptr that tensor's.
    """
    FIRST_TAP: tl.constexpr = 0 if PAST else (KT - 1) * KY * KX
    blocks = tl.cdiv(K * UNIT_K, BK)
    channel = tl.arange(0, BK)
    if DIRECTION == BACK:
        w_rows = n * _index(stride_wo, UNIT_K, WIDE)
    else:
        w_rows = channel * _index(stride_wo, UNIT_N, WIDE)
    for step in range(begin, end):
        index = step // blocks
        first = (step - index * blocks) * BK
        c = first + channel
        tap = FIRST_TAP + index
        lag = KT - 1 - tap // (KY * KX)
        dy = tap // KX % KY - KY // 2
        dx = tap % KX - KX // 2
        if DIRECTION == AHEAD:
            lag = -lag
            dy = -dy
            dx = -dx
        ok = row_ok & (y + dy >= 0) & (y + dy < Y) & (x + dx >= 0) & (x + dx < X)
        offset = source + _index(dy * stride_y + dx * stride_x - lag * stride_f, UNIT_K, WIDE)
        if HISTORY:
            ok = ok & (frame < lag)
            offset = history + _index(dy * stride_hy + dx * stride_hx - lag * stride_hf, UNIT_K, WIDE)
        elif PAST:
            if DIRECTION == BACK:
                offset_h = history + _index(dy * stride_hy + dx * stride_hx - lag * stride_hf, UNIT_K, WIDE)
                offset = _choose(frame >= lag, offset, h_from_p * UNIT_K + offset_h)
            else:
                ok = ok & (frame >= lag) & (frame - lag < source_frames)
        # WHOLE: K and N fill their tiles, so that only borders are masked.
        if WHOLE:
            a = tl.load(p_ptr + offset[:, None] + c[None, :], mask=ok[:, None], other=0.0)
        else:
            a = tl.load(p_ptr + offset[:, None] + c[None, :], mask=ok[:, None] & (c[None, :] < K * UNIT_K), other=0.0)
        if DIRECTION == BACK:
            pointers = w_ptr + (tap * stride_wt * UNIT_K + first) + w_rows[:, None] + channel[None, :]
            if WHOLE:
                w = tl.load(pointers)
            else:
                w = tl.load(pointers, mask=(n[:, None] < N * UNIT_N) & (c[None, :] < K * UNIT_K), other=0.0)
            acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
        else:
            pointers = w_ptr + (tap * stride_wt + first * stride_wo) * UNIT_N + w_rows[:, None] + n[None, :]
            if WHOLE:
                w = tl.load(pointers)
            else:
                w = tl.load(pointers, mask=(c[:, None] < K * UNIT_K) & (n[None, :] < N * UNIT_N), other=0.0)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _accumulate_boxes(
    acc, begin, end, video, weight, batch, frame, y, x, n, K, N,
    PAST: tl.constexpr, KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
    DIRECTION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_accumulate` over the box that begins at (batch, frame, y, x): what lies outside of the video is zero.

    The product is made transposed: only as its second operand does a reshaped box go to the tensor cores as it lies in
    shared memory, and not through registers.
    """
    FIRST_TAP: tl.constexpr = 0 if PAST else (KT - 1) * KY * KX
    channels = K * UNIT_K
    columns = (K if DIRECTION == BACK else N) * (UNIT_K if DIRECTION == BACK else UNIT_N)
    blocks = tl.cdiv(channels, BK)
    tap = begin // blocks
    first = (begin - tap * blocks) * BK
    tap += FIRST_TAP
    acc = tl.trans(acc)
    for _ in range(begin, end):
        lag = KT - 1 - tap // (KY * KX)
        dy = tap // KX % KY - KY // 2
        dx = tap % KX - KX // 2
        if DIRECTION == AHEAD:
            lag = -lag
            dy = -dy
            dx = -dx
        a = tl.trans(tl.reshape(video.load([batch, frame - lag, y + dy, x + dx, first]), [BM, BK]))
        # Columns of the weight are taps x Cin. A box that reaches into the next tap meets zeros of a, or makes columns
        # that nobody stores.
        if DIRECTION == BACK:
            w = weight.load([n, tap * columns + first])
        else:
            w = tl.trans(weight.load([first, tap * columns + n]))
        acc = tl.dot(w, a, acc, input_precision=PRECISION)
        first += BK
        tap += (first >= channels).to(tl.int32)
        first = tl.where(first >= channels, 0, first)
    return tl.trans(acc)


@triton.jit
def _sum_past(
    acc, part, end_part, parts, p_ptr, p_box, h_ptr, w_ptr, w_box, batch, past_frame, y, x, row_ok, n,
    box_b, box_frame, box_y, box_x, box_n, source_frames, Y, X, K, N,
    stride_pb, stride_pf, stride_py, stride_px, stride_hb, stride_hf, stride_hy, stride_hx, stride_wo, stride_wt,
    KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BX: tl.constexpr,
    UNIT_K: tl.constexpr, UNIT_N: tl.constexpr, DIRECTION: tl.constexpr, PARTS: tl.constexpr,
    HAS_HISTORY: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + parts part..end_part of the past taps of a tile; without PARTS there is but one."""
    history = _rows(batch, past_frame + KT - 1, y, x, stride_hb, stride_hf, stride_hy, stride_hx, UNIT_K, WIDE)
    in_time_tap = tl.cdiv(K * UNIT_K, BK) * KY * KX
    steps = in_time_tap * (KT - 1)
    chunk = tl.cdiv(steps, parts)
    # Without PARTS the sum goes on in acc itself.
    for index in range(part, end_part if PARTS else part + 1):
        begin = tl.minimum(index * chunk, steps)
        end = tl.minimum(begin + chunk, steps) if PARTS else steps * end_part
        summed = tl.zeros([BM, BN], tl.float32) if PARTS else acc
        if BX == 0:
            source = _rows(batch, past_frame, y, x, stride_pb, stride_pf, stride_py, stride_px, UNIT_K, WIDE)
            summed = _accumulate(
                summed, begin, end, p_ptr, source, _distance(h_ptr, p_ptr, UNIT_K), history,
                past_frame, y, x, row_ok, w_ptr, n, source_frames, Y, X, K, N,
                stride_pf, stride_py, stride_px, stride_hf, stride_hy, stride_hx, stride_wo, stride_wt,
                True, False, KT, KY, KX, BM, BN, BK, UNIT_K, UNIT_N, DIRECTION, WHOLE, WIDE, PRECISION,
            )  # fmt: skip
        else:
            # Time tap t of frame i reads frame i - (KT - 1 - t). Frames of one box pass from history to the clip at
            # different taps, each once: all of history first keeps the order of every row's sum.
            if HAS_HISTORY:
                summed = _accumulate(
                    summed, begin, tl.minimum(end, tl.maximum(KT - 1 - box_frame, 0) * in_time_tap),
                    h_ptr, history, 0, history, past_frame, y, x, row_ok, w_ptr, n, source_frames, Y, X, K, N,
                    stride_hf, stride_hy, stride_hx, stride_hf, stride_hy, stride_hx, stride_wo, stride_wt,
                    True, True, KT, KY, KX, BM, BN, BK, UNIT_K, UNIT_N, DIRECTION, WHOLE, WIDE, PRECISION,
                )  # fmt: skip
                begin = tl.maximum(begin, (KT - box_frame - BF) * in_time_tap)
            summed = _accumulate_boxes(
                summed, begin, end, p_box, w_box, box_b, box_frame, box_y, box_x, box_n, K, N,
                True, KT, KY, KX, BM, BN, BK, UNIT_K, UNIT_N, DIRECTION, PRECISION,
            )  # fmt: skip
        acc = acc + summed if PARTS else summed
    return acc


@triton.jit
def _sum_last(
    acc, part, end_part, parts, x_ptr, x_box, w_ptr, w_box, batch, frame, y, x, row_ok, n,
    box_b, box_frame, box_y, box_x, box_n, Y, X, K, N,
    stride_xb, stride_xf, stride_xy, stride_xx, stride_wo, stride_wt,
    KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr,
    UNIT_K: tl.constexpr, UNIT_N: tl.constexpr, DIRECTION: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + parts part..end_part of the last taps of a tile; without PARTS there is but one."""
    source = _rows(batch, frame, y, x, stride_xb, stride_xf, stride_xy, stride_xx, UNIT_K, WIDE)
    steps = tl.cdiv(K * UNIT_K, BK) * KY * KX
    chunk = tl.cdiv(steps, parts)
    for index in range(part, end_part if PARTS else part + 1):
        begin = tl.minimum(index * chunk, steps)
        end = tl.minimum(begin + chunk, steps)
        summed = tl.zeros([BM, BN], tl.float32) if PARTS else acc
        if BX == 0:
            summed = _accumulate(
                summed, begin, end, x_ptr, source, 0, source, frame, y, x, row_ok, w_ptr, n, 0, Y, X, K, N,
                stride_xf, stride_xy, stride_xx, stride_xf, stride_xy, stride_xx, stride_wo, stride_wt,
                False, False, KT, KY, KX, BM, BN, BK, UNIT_K, UNIT_N, DIRECTION, WHOLE, WIDE, PRECISION,
            )  # fmt: skip
        else:
            summed = _accumulate_boxes(
                summed, begin, end, x_box, w_box, box_b, box_frame, box_y, box_x, box_n, K, N,
                False, KT, KY, KX, BM, BN, BK, UNIT_K, UNIT_N, DIRECTION, PRECISION,
            )  # fmt: skip
        acc = acc + summed if PARTS else summed
    return acc


@triton.jit
def _store_dot(
    last, z_ptr, dot_ptr, stride_zb, stride_zf, stride_zy, stride_zx, rows, frames, Y, X, streams, stream, tile_n,
    m, n, row_ok, store_ok, batch, i, y, x, UNIT_Z: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """<last, z> of each row, before the scale: the tile's part of last_scale's gradient."""
    z = _rows(batch, i + stream * frames, y, x, stride_zb, stride_zf, stride_zy, stride_zx, UNIT_Z, WIDE)
    z_tile = tl.load(z_ptr + z[:, None] + n[None, :], mask=store_ok, other=0.0)
    out_row = m + (batch * (streams - 1) + stream) * (frames * Y * X)
    dot = tl.sum(last * z_tile.to(tl.float32), 1)
    tl.store(dot_ptr + tile_n.to(tl.int64) * rows * streams + out_row, dot, mask=row_ok)


@triton.jit
def _times_scale(value, scale_ptr, batch, i, frames, streams, stream, row_ok, SCALED: tl.constexpr):
    """value times its frame's (B, F) scale."""
    if SCALED:
        index = (batch * streams + stream) * frames + i
        value = value * tl.load(scale_ptr + index, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    return value


@triton.jit
def _plus_past(
    last, past, scale_ptr, batch, i, frames, streams, stream, row_ok, SCALED: tl.constexpr
):  # fmt: skip
    """last + scale * past. The fused rounding is spelled out: both kernels that end here must round alike."""
    if SCALED:
        index = (batch * streams + stream) * frames + i
        scale = tl.load(scale_ptr + index, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        return tl.fma(past, tl.broadcast_to(scale, past.shape), last)
    else:
        return last + past


@triton.jit
def _store_out(
    out_ptr, value, frames, Y, X, N, streams, stream, m, n, store_ok, batch, UNIT_N: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    out_row = m + (batch * (streams - 1) + stream) * (frames * Y * X)
    pointers = out_ptr + (out_row * _index(N, UNIT_N, WIDE))[:, None] + n[None, :]
    tl.store(pointers, value.to(out_ptr.dtype.element_ty), mask=store_ok)


@triton.jit(do_not_specialize=_INTEGERS)
def causal_conv3d_kernel(
    p_ptr, h_ptr, x_ptr, w_ptr, z_ptr, past_scale_ptr, last_scale_ptr, out_ptr, past_ptr, dot_ptr, part_ptr,
    p_box, x_box, w_box,
    stride_pb: tl.int64, stride_pf: tl.int64, stride_py: tl.int64, stride_px: tl.int64,
    stride_hb: tl.int64, stride_hf: tl.int64, stride_hy: tl.int64, stride_hx: tl.int64,
    stride_xb: tl.int64, stride_xf: tl.int64, stride_xy: tl.int64, stride_xx: tl.int64,
    stride_zb: tl.int64, stride_zf: tl.int64, stride_zy: tl.int64, stride_zx: tl.int64,
    stride_wo: tl.int64, stride_wt: tl.int64,
    rows: tl.int32, frames: tl.int32, first_frame: tl.int32, source_frames: tl.int32, Y: tl.int32, X: tl.int32,
    K: tl.int32, N: tl.int32, streams: tl.int32, clean: tl.int32, past_parts: tl.int32, last_parts: tl.int32,
    KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,
    UNIT_K: tl.constexpr, UNIT_N: tl.constexpr, UNIT_Z: tl.constexpr,
    DIRECTION: tl.constexpr, PAST: tl.constexpr, LAST: tl.constexpr, STORE_PAST: tl.constexpr,
    HAS_PAST_SCALE: tl.constexpr, HAS_LAST_SCALE: tl.constexpr, STORE_OUT: tl.constexpr, DOT: tl.constexpr,
    HAS_HISTORY: tl.constexpr, PARTS: tl.constexpr, SPREAD: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of pixels and output channels of all streams.

    p is what past taps read, x what last taps read. BACK adds past_scale * past to every stream, AHEAD adds it to the
    clean one. DOT also writes <last, z> of each row, before the scale. With SPREAD each part of a sum has a program of
    its own, the past's first, then the streams', and `causal_conv3d_combine_kernel` does the rest.
    """
    tiles_n = tl.cdiv(N * UNIT_N, BN)
    tile_n = tl.program_id(0) % tiles_n
    m, row_ok, batch, i, y, x, box_b, box_i, box_y, box_x = _tile(
        tl.program_id(0) // tiles_n, rows, frames, Y, X, BM, BF, BY, BX
    )
    box_n = tile_n * BN
    n = box_n + tl.arange(0, BN)
    store_ok = row_ok[:, None] & (n < N * UNIT_N)[None, :]
    past_frame = i + first_frame
    unit = tl.program_id(1)  # of the parts; without SPREAD there is one program

    past = tl.zeros([BM, BN], tl.float32)
    if PAST and (DIRECTION == BACK or SPREAD or not LAST):
        past = _sum_past(
            past, unit, unit + 1 if SPREAD else past_parts, past_parts,
            p_ptr, p_box, h_ptr, w_ptr, w_box, batch, past_frame, y, x, row_ok, n,
            box_b, box_i + first_frame, box_y, box_x, box_n, source_frames, Y, X, K, N,
            stride_pb, stride_pf, stride_py, stride_px, stride_hb, stride_hf, stride_hy, stride_hx,
            stride_wo, stride_wt, KT, KY, KX, BM, BN, BK, BF, BX, UNIT_K, UNIT_N,
            DIRECTION, PARTS, HAS_HISTORY, WHOLE, WIDE, PRECISION,
        )  # fmt: skip
    if STORE_PAST and not SPREAD:
        pointers = past_ptr + (m * _index(N, UNIT_N, WIDE))[:, None] + n[None, :]
        tl.store(pointers, past.to(past_ptr.dtype.element_ty), mask=store_ok)
    if SPREAD:
        if LAST:
            own = tl.maximum(unit - past_parts, 0)
            stream = own // last_parts
            part = own - stream * last_parts
            frame = stream * frames
            past = _sum_last(
                past, part, tl.where(unit < past_parts, 0, part + 1), last_parts, x_ptr, x_box, w_ptr, w_box,
                batch, i + frame, y, x, row_ok, n, box_b, box_i + frame, box_y, box_x, box_n, Y, X, K, N,
                stride_xb, stride_xf, stride_xy, stride_xx, stride_wo, stride_wt,
                KT, KY, KX, BM, BN, BK, BX, UNIT_K, UNIT_N, DIRECTION, PARTS, WHOLE, WIDE, PRECISION,
            )  # fmt: skip
        pointers = part_ptr + unit.to(tl.int64) * rows * (N * UNIT_N) + (m * _index(N, UNIT_N, WIDE))[:, None]
        tl.store(pointers + n[None, :], past, mask=store_ok)
    elif LAST:
        for stream in range(streams):
            frame = stream * frames
            acc = _sum_last(
                tl.zeros([BM, BN], tl.float32), 0, last_parts, last_parts, x_ptr, x_box, w_ptr, w_box,
                batch, i + frame, y, x, row_ok, n, box_b, box_i + frame, box_y, box_x, box_n, Y, X, K, N,
                stride_xb, stride_xf, stride_xy, stride_xx, stride_wo, stride_wt,
                KT, KY, KX, BM, BN, BK, BX, UNIT_K, UNIT_N, DIRECTION, PARTS, WHOLE, WIDE, PRECISION,
            )  # fmt: skip
            if DOT:
                _store_dot(
                    acc, z_ptr, dot_ptr, stride_zb, stride_zf, stride_zy, stride_zx, rows, frames, Y, X, streams,
                    stream, tile_n, m, n, row_ok, store_ok, batch, i, y, x, UNIT_Z, WIDE,
                )  # fmt: skip
            if STORE_OUT:
                acc = _times_scale(acc, last_scale_ptr, batch, i, frames, streams, stream, row_ok, HAS_LAST_SCALE)
                if PAST and DIRECTION == AHEAD:
                    acc = _sum_past(
                        acc, 0, tl.where(stream == clean, past_parts, 0), past_parts,
                        p_ptr, p_box, h_ptr, w_ptr, w_box, batch, past_frame, y, x, row_ok, n,
                        box_b, box_i + first_frame, box_y, box_x, box_n, source_frames, Y, X, K, N,
                        stride_pb, stride_pf, stride_py, stride_px, stride_hb, stride_hf, stride_hy, stride_hx,
                        stride_wo, stride_wt, KT, KY, KX, BM, BN, BK, BF, BX, UNIT_K, UNIT_N,
                        DIRECTION, PARTS, HAS_HISTORY, WHOLE, WIDE, PRECISION,
                    )  # fmt: skip
                elif PAST:
                    acc = _plus_past(
                        acc, past, past_scale_ptr, batch, i, frames, streams, stream, row_ok, HAS_PAST_SCALE
                    )
                _store_out(out_ptr, acc, frames, Y, X, N, streams, stream, m, n, store_ok, batch, UNIT_N, WIDE)


@triton.jit
def _sum_stored(acc, part_ptr, offset, ok, plane, unit, end):
    """acc + stored parts unit..end, one after the other."""
    first = part_ptr + unit * plane
    for index in range(end - unit):
        acc += tl.load(first + index * plane + offset, mask=ok, other=0.0)
    return acc


@triton.jit(do_not_specialize=_INTEGERS)
def causal_conv3d_combine_kernel(
    part_ptr, z_ptr, past_scale_ptr, last_scale_ptr, out_ptr, past_ptr, dot_ptr,
    stride_zb: tl.int64, stride_zf: tl.int64, stride_zy: tl.int64, stride_zx: tl.int64,
    rows: tl.int32, frames: tl.int32, Y: tl.int32, X: tl.int32,
    N: tl.int32, streams: tl.int32, clean: tl.int32, past_parts: tl.int32, last_parts: tl.int32,
    BM: tl.constexpr, BN: tl.constexpr, UNIT_N: tl.constexpr, UNIT_Z: tl.constexpr,
    DIRECTION: tl.constexpr, PAST: tl.constexpr, LAST: tl.constexpr, STORE_PAST: tl.constexpr,
    HAS_PAST_SCALE: tl.constexpr, HAS_LAST_SCALE: tl.constexpr, STORE_OUT: tl.constexpr, DOT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The end of `causal_conv3d_kernel` from the parts that its programs summed, added in the same order."""
    tiles_n = tl.cdiv(N * UNIT_N, BN)
    tile_n = tl.program_id(0) % tiles_n
    m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    row_ok = m < rows
    ok = row_ok[:, None] & (n < N * UNIT_N)[None, :]
    batch, i, y, x = _pixels(m, frames, Y, X)
    plane = rows.to(tl.int64) * (N * UNIT_N)
    offset = (m * _index(N, UNIT_N, WIDE))[:, None] + n[None, :]
    past = tl.zeros([BM, BN], tl.float32)
    if PAST and (DIRECTION == BACK or not LAST):
        past = _sum_stored(past, part_ptr, offset, ok, plane, 0, past_parts)
    if STORE_PAST:
        tl.store(past_ptr + offset, past.to(past_ptr.dtype.element_ty), mask=ok)
    if LAST:
        for stream in range(streams):
            unit = past_parts + stream * last_parts
            acc = _sum_stored(tl.zeros([BM, BN], tl.float32), part_ptr, offset, ok, plane, unit, unit + last_parts)
            if DOT:
                _store_dot(
                    acc, z_ptr, dot_ptr, stride_zb, stride_zf, stride_zy, stride_zx, rows, frames, Y, X, streams,
                    stream, tile_n, m, n, row_ok, ok, batch, i, y, x, UNIT_Z, WIDE,
                )  # fmt: skip
            if STORE_OUT:
                acc = _times_scale(acc, last_scale_ptr, batch, i, frames, streams, stream, row_ok, HAS_LAST_SCALE)
                if PAST and DIRECTION == AHEAD:
                    end = tl.where(stream == clean, past_parts, 0)
                    acc = _sum_stored(acc, part_ptr, offset, ok, plane, 0, end)
                elif PAST:
                    acc = _plus_past(
                        acc, past, past_scale_ptr, batch, i, frames, streams, stream, row_ok, HAS_PAST_SCALE
                    )
                _store_out(out_ptr, acc, frames, Y, X, N, streams, stream, m, n, ok, batch, UNIT_N, WIDE)


@triton.jit(do_not_specialize=_INTEGERS)
def causal_conv3d_streams_kernel(
    g_ptr, past_ptr, past_scale_ptr, last_scale_ptr, sum_ptr, scaled_ptr, dot_ptr,
    stride_gb: tl.int64, stride_gf: tl.int64, stride_gy: tl.int64, stride_gx: tl.int64,
    rows: tl.int32, frames: tl.int32, Y: tl.int32, X: tl.int32, N: tl.int32, streams: tl.int32,
    BM: tl.constexpr, BN: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
    HAS_PAST_SCALE: tl.constexpr, SUM: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One pass over the output gradient g: S = sum of past_scale * g, last_scale * g, and <g, past> of each row."""
    tiles_n = tl.cdiv(N * UNIT_N, BN)
    tile_n = tl.program_id(0) % tiles_n
    m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    row_ok = m < rows
    ok = row_ok[:, None] & (n < N * UNIT_N)[None, :]
    batch, i, y, x = _pixels(m, frames, Y, X)
    dense = (m * _index(N, UNIT_N, WIDE))[:, None] + n[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    if DOT:
        past = tl.load(past_ptr + dense, mask=ok, other=0.0).to(tl.float32)
    for stream in range(streams):
        source = _rows(batch, i + stream * frames, y, x, stride_gb, stride_gf, stride_gy, stride_gx, UNIT_K, WIDE)
        g = tl.load(g_ptr + source[:, None] + n[None, :], mask=ok, other=0.0).to(tl.float32)
        scale_index = (batch * streams + stream) * frames + i
        out_row = m + (batch * (streams - 1) + stream) * (frames * Y * X)
        if DOT:
            tl.store(dot_ptr + tile_n.to(tl.int64) * rows * streams + out_row, tl.sum(g * past, 1), mask=row_ok)
        if SCALED:
            last_scale = tl.load(last_scale_ptr + scale_index, mask=row_ok, other=0.0).to(tl.float32)
            pointers = scaled_ptr + (out_row * _index(N, UNIT_N, WIDE))[:, None] + n[None, :]
            tl.store(pointers, (g * last_scale[:, None]).to(scaled_ptr.dtype.element_ty), mask=ok)
        if SUM:
            if HAS_PAST_SCALE:
                g *= tl.load(past_scale_ptr + scale_index, mask=row_ok, other=0.0).to(tl.float32)[:, None]
            total += g
    if SUM:
        tl.store(sum_ptr + dense, total.to(sum_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_INTEGERS)
def causal_conv3d_weight_kernel(
    g_ptr, x_ptr, h_ptr, part_ptr, g_box, x_box,
    stride_gb: tl.int64, stride_gf: tl.int64, stride_gy: tl.int64, stride_gx: tl.int64,
    stride_xb: tl.int64, stride_xf: tl.int64, stride_xy: tl.int64, stride_xx: tl.int64,
    stride_hb: tl.int64, stride_hf: tl.int64, stride_hy: tl.int64, stride_hx: tl.int64,
    rows: tl.int32, frames: tl.int32, Y: tl.int32, X: tl.int32, K: tl.int32, N: tl.int32,
    chunk: tl.int32,
    KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, PAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr,
    UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """part[split, co, tap, ci] = sum over a chunk of pixels of g[pixel, co] * source[pixel shifted by tap, ci].

    K is Cout (the rows of the result), N is Cin. Past taps read x back in time and then history. A chunk is a number
    of rows, or of boxes: those first, then a share of the rows whose source is history, to which boxes are zero.
    """
    FIRST_TAP: tl.constexpr = 0 if PAST else (KT - 1) * KY * KX
    TAPS: tl.constexpr = (KT - 1) * KY * KX if PAST else KY * KX
    tiles_m = tl.cdiv(K * UNIT_K, BM)
    tiles_n = tl.cdiv(N * UNIT_N, BN)
    program = tl.program_id(0)
    splits = tl.num_programs(0) // (tiles_m * tiles_n * TAPS)
    tile_n = program % tiles_n
    program //= tiles_n
    tile_m = program % tiles_m
    program //= tiles_m
    tap = FIRST_TAP + program % TAPS
    split = program // TAPS
    lag = KT - 1 - tap // (KY * KX)
    dy = tap // KX % KY - KY // 2
    dx = tap % KX - KX // 2
    co = tile_m * BM + tl.arange(0, BM)
    ci = tile_n * BN + tl.arange(0, BN)
    shift = _index(dy * stride_xy + dx * stride_xx - lag * stride_xf, UNIT_N, WIDE)
    shift_h = _index(dy * stride_hy + dx * stride_hx - lag * stride_hf, UNIT_N, WIDE)

    h_from_x = _distance(h_ptr, x_ptr, UNIT_N)
    acc = tl.zeros([BM, BN], tl.float32)
    # Frames that the rows of the loop over pointers count, and those rows.
    inner = frames
    start = split * chunk
    end = tl.minimum(start + chunk, rows)
    if BX > 0:
        across = tl.cdiv(X, BX)
        down = tl.cdiv(Y, BY)
        deep = tl.cdiv(frames, BF)
        box_x = start % across * BX
        box_y = start // across % down * BY
        box_i = start // (across * down) % deep * BF
        box_b = start // (across * down * deep)
        boxes = rows // (frames * Y * X) * deep * down * across
        for _ in range(start, tl.minimum(start + chunk, boxes)):
            g = tl.reshape(g_box.load([box_b, box_i, box_y, box_x, tile_m * BM]), [BK, BM])
            a = tl.reshape(x_box.load([box_b, box_i - lag, box_y + dy, box_x + dx, tile_n * BN]), [BK, BN])
            acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION)
            box_x += BX
            box_y += tl.where(box_x >= X, BY, 0)
            box_x = tl.where(box_x >= X, 0, box_x)
            box_i += tl.where(box_y >= Y, BF, 0)
            box_y = tl.where(box_y >= Y, 0, box_y)
            box_b += (box_i >= frames).to(tl.int32)
            box_i = tl.where(box_i >= frames, 0, box_i)
        inner = tl.minimum(lag, frames) if PAST else 0
        history_rows = rows // frames * inner
        share = tl.cdiv(tl.cdiv(history_rows, BK), splits) * BK
        start = split * share
        end = tl.minimum(start + share, history_rows)
    if PAST or BX == 0:
        for first in range(start, end, BK):
            m = first + tl.arange(0, BK)
            row_ok = m < end
            batch, i, y, x = _pixels(m, inner, Y, X)
            ok = row_ok & (y + dy >= 0) & (y + dy < Y) & (x + dx >= 0) & (x + dx < X)
            g_rows = _rows(batch, i, y, x, stride_gb, stride_gf, stride_gy, stride_gx, UNIT_K, WIDE)
            x_rows = _rows(batch, i, y, x, stride_xb, stride_xf, stride_xy, stride_xx, UNIT_N, WIDE) + shift
            if PAST:
                h_rows = _rows(batch, i + KT - 1, y, x, stride_hb, stride_hf, stride_hy, stride_hx, UNIT_N, WIDE)
                x_rows = _choose(i >= lag, x_rows, h_from_x * UNIT_N + (h_rows + shift_h))
            g_ok = ok[:, None]
            a_ok = ok[:, None]
            if not WHOLE:
                g_ok = g_ok & (co[None, :] < K * UNIT_K)
                a_ok = a_ok & (ci[None, :] < N * UNIT_N)
            g = tl.load(g_ptr + g_rows[:, None] + co[None, :], mask=g_ok, other=0.0)
            a = tl.load(x_ptr + x_rows[:, None] + ci[None, :], mask=a_ok, other=0.0)
            acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION)
    pointers = part_ptr + ((split.to(tl.int64) * (K * UNIT_K) + co[:, None]) * TAPS + tap - FIRST_TAP) * (N * UNIT_N)
    tl.store(pointers + ci[None, :], acc, mask=(co[:, None] < K * UNIT_K) & (ci[None, :] < N * UNIT_N))


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    past_scale: torch.Tensor | None,
    last_scale: torch.Tensor | None,
    history: torch.Tensor | None,
    pad_value: float,
    layout: FrameLayout,
    keep_past: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out (B, Cout, F, Y, X), past (B, Cout, T, Y, X) or None), channels_last_3d."""
    launches, out, past = plan_forward(
        x, weight, past_scale, last_scale, history, pad_value, layout, architecture(x.device), keep_past=keep_past
    )
    run(launches, x.device)
    return out, past


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    past_scale: torch.Tensor | None,
    last_scale: torch.Tensor | None,
    history: torch.Tensor | None,
    past: torch.Tensor | None,
    pad_value: float,
    layout: FrameLayout,
    mask: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (x, weight, past_scale, last_scale, history), None where `mask` does not ask.

    `past` is what `forward` returned, or None to have it computed again where past_scale's gradient needs it.
    """
    x, B = _channels_last(x), x.shape[0]
    launches, grad_x, parts, past_dot, last_dot, grad_history = plan_backward(
        grad, x, weight, past_scale, last_scale, history, past, pad_value, layout, mask, architecture(x.device)
    )
    run(launches, x.device)
    grad_past_scale = None if past_dot is None else _sum_dots(past_dot, x)
    if mask[2] and weight.shape[2] == 1:
        grad_past_scale = x.new_zeros(B, x.shape[2])
    grad_last_scale = None if last_dot is None else _sum_dots(last_dot, x)
    return grad_x, _sum_parts(parts, weight), grad_past_scale, grad_last_scale, grad_history


def past_term(history: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """history (B, Cin, kt - 1, Y, X) -> (B, Cout, Y, X), channels_last."""
    launches, past = plan_past_term(history, weight, architecture(history.device))
    run(launches, history.device)
    return past.squeeze(2)


def past_term_backward(
    grad: torch.Tensor, history: torch.Tensor, weight: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of (history, weight), None where `mask` does not ask."""
    launches, grad_history, parts = plan_past_term_backward(
        grad.unsqueeze(2), history, weight, mask, architecture(history.device)
    )
    run(launches, history.device)
    return grad_history, _sum_parts(parts, weight)


@dataclass(frozen=True)
class Work:
    """What launches do: passes of one time tap over one frame, multiply-adds, and the bytes of every operand once."""

    tap_passes: int
    multiply_adds: int
    bytes: int


def work(launches: list[Launch]) -> Work:
    """Counted from the arguments that the launches hand to the kernels; batch and all streams together."""
    passes = operations = total = 0
    for launch in launches:
        args = launch.args
        touched: dict[int, int] = {}
        for value in args.values():
            if isinstance(value, torch.Tensor):
                size = math.prod(s for s, stride in zip(value.shape, value.stride(), strict=True) if stride)
                memory = value.untyped_storage()._cdata
                touched[memory] = max(touched.get(memory, 0), size * value.element_size())
        total += sum(touched.values())
        if "KT" in args:
            images = args["rows"] // (args["Y"] * args["X"])
            # The weight gradient counts the frames of all streams as its own.
            last = args["LAST"] * args["streams"] if "LAST" in args else not args["PAST"]
            here = images * ((args["KT"] - 1) * args["PAST"] + last)
            passes += here
            channels = args["K"] * args["UNIT_K"] * args["N"] * args["UNIT_N"]
            operations += here * args["KY"] * args["KX"] * args["Y"] * args["X"] * channels
    return Work(passes, operations, total)


def plan_forward(
    x, weight, past_scale, last_scale, history, pad_value, layout, architecture, config=None, keep_past=True
) -> tuple[list[Launch], torch.Tensor, torch.Tensor | None]:
    """(the launches of `forward`, out, past) for an architecture; tensors may be meta tensors."""
    x, weight = _channels_last(x), _packed(weight)
    B, _, _, Y, X = x.shape
    Cout, kt = weight.shape[0], weight.shape[2]
    T = layout.frames
    out = _video(x, (B, Cout, layout.total_frames, Y, X))
    past = _video(x, (B, Cout, T, Y, X)) if keep_past and kt > 1 else None
    launches = _convolution(
        "fwd", x.narrow(2, layout.clean_start, T), _history(x, history, pad_value, kt), x, weight,
        frames=T, out=out, past=past, past_scale=past_scale, last_scale=last_scale,
        streams=layout.streams, architecture=architecture, config=config,
    )  # fmt: skip
    return launches, out, past


def plan_backward(
    grad, x, weight, past_scale, last_scale, history, past, pad_value, layout, mask, architecture, configs=None
) -> tuple[
    list[Launch],
    torch.Tensor | None,
    list[torch.Tensor],
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]:
    """(launches, grad_x, fp32 parts of grad_weight, of past_scale's gradient, of last_scale's, grad_history).

    `configs` maps directions to configurations that replace the chosen ones.
    """
    need_x, need_weight, need_past_scale, need_last_scale, need_history = mask
    configs = configs or {}
    x, grad, weight = _channels_last(x), _channels_last(grad), _packed(weight)
    B, Cin, F, Y, X = x.shape
    Cout, kt = weight.shape[0], weight.shape[2]
    T, streams = layout.frames, layout.streams
    need_history = need_history and history is not None
    source = _history(x, history, pad_value, kt)
    clean = x.narrow(2, layout.clean_start, T)
    launches = []
    options = {"frames": T, "architecture": architecture}

    if kt > 1 and need_past_scale and past is None:
        past = _video(x, (B, Cout, T, Y, X))
        launches += _convolution("fwd", clean, source, None, weight, past=past, config=configs.get("fwd"), **options)
    need_sum = kt > 1 and (need_x or need_weight or need_history)
    total, scaled, past_dot = grad, grad, None
    if need_sum and (streams > 1 or past_scale is not None):
        total = _video(x, (B, Cout, T, Y, X))
    if need_weight and last_scale is not None:
        scaled = _video(x, grad.shape)
    if total is not grad or scaled is not grad or (kt > 1 and need_past_scale):
        launch, past_dot = _streams_pass(
            grad, past if kt > 1 and need_past_scale else None, past_scale, last_scale,
            total if total is not grad else None, scaled if scaled is not grad else None,
            streams=streams, config=configs.get("streams"), **options,
        )  # fmt: skip
        launches.append(launch)

    grad_x = _video(x, x.shape) if need_x else None
    grad_history = _video(x, (B, Cin, kt - 1, Y, X)) if need_history else None
    last_dot = None
    if need_x or need_last_scale:
        launches += _convolution(
            "dgrad", total if need_x and kt > 1 else None, None, grad, weight,
            out=grad_x, last_scale=last_scale, streams=streams, clean=layout.clean_start // T,
            dot_with=x if need_last_scale else None, config=configs.get("dgrad"), **options,
        )  # fmt: skip
        last_dot = launches[-1].args["dot_ptr"].unflatten(1, (B, F, Y * X)) if need_last_scale else None
    if grad_history is not None and kt > 1:
        launches += _convolution(
            "dgrad", total, None, None, weight, past=grad_history, frames=kt - 1, first_frame=1 - kt,
            architecture=architecture, config=configs.get("dgrad"),
        )  # fmt: skip
    parts: list[torch.Tensor] = []
    if need_weight:
        if kt > 1:
            launches.append(_weight_gradient(total, clean, source, weight, parts, True, architecture, configs))
        launches.append(_weight_gradient(scaled, x, None, weight, parts, False, architecture, configs))
    return launches, grad_x, parts, past_dot, last_dot, grad_history


def plan_past_term(history, weight, architecture, config=None) -> tuple[list[Launch], torch.Tensor]:
    """(launches, past (B, Cout, 1, Y, X))."""
    history, weight = _channels_last(history), _packed(weight)
    past = _video(history, (history.shape[0], weight.shape[0], 1, *history.shape[3:]))
    frames = history.shape[2]
    launches = _convolution(
        "fwd", history, None, None, weight, frames=1, first_frame=frames, past=past,
        architecture=architecture, config=config,
    )  # fmt: skip
    return launches, past


def plan_past_term_backward(
    grad, history, weight, mask, architecture, configs=None
) -> tuple[list[Launch], torch.Tensor | None, list[torch.Tensor]]:
    """(launches, grad_history, fp32 parts of grad_weight); grad is (B, Cout, 1, Y, X)."""
    configs = configs or {}
    history, grad, weight = _channels_last(history), _channels_last(grad), _packed(weight)
    launches, grad_history = [], None
    parts: list[torch.Tensor] = []
    if mask[0]:
        grad_history = _video(history, history.shape)
        frames = history.shape[2]
        launches += _convolution(
            "dgrad", grad, None, None, weight, past=grad_history, frames=frames, first_frame=-frames,
            architecture=architecture, config=configs.get("dgrad"),
        )  # fmt: skip
    if mask[1]:
        launches.append(_weight_gradient(grad, history, history, weight, parts, True, architecture, configs))
    return launches, grad_history, parts


def _convolution(
    direction, past_source, history, source, weight, *, frames, architecture, out=None, past=None, past_scale=None,
    last_scale=None, streams=0, clean=0, first_frame=0, dot_with=None, config=None,
) -> list[Launch]:  # fmt: skip
    """The main kernel, and the one that combines its parts where programs share a tile.

    Past taps if there is a past_source, last taps if there is a source.
    """
    like = past_source if source is None else source
    none = like.new_empty(0)
    B, K, _, Y, X = like.shape
    Cout, Cin, kt, ky, kx = weight.shape
    back = direction == "fwd"
    N = Cout if back else Cin
    has_past = past_source is not None and kt > 1
    videos = {
        "p": past_source if has_past else like,
        "h": like if history is None else history,
        "x": like,
        "z": like if dot_with is None else dot_with,
    }
    unit_k, unit_n = _unit(K, *[videos[name] for name in "phx"]), _unit(N, dtype=like.dtype)
    unit_z = _unit(N, videos["z"])
    # The packed weight has Cin innermost, which is reduced forward and produced backward.
    unit_w = unit_k if back else unit_n
    config = config or defaults.conv_config(
        architecture, like.dtype, K, N, Y * X, direction if dot_with is None else "dgrad_dot"
    )
    rows = _rows_of(B, frames, Y, X, streams)
    box = None
    used = [videos["p"]] * has_past + [like] * (source is not None)
    aligned = unit_k > 1 and unit_w > 1 and weight.data_ptr() % 16 == 0
    if config.boxes and aligned and all(map(_has_strides, used)):
        box = _box(config.block_m, frames, Y, X)
    if config.boxes and box is None and dot_with is not None:
        # Addresses take the registers that a tile of z wants.
        config = dataclasses.replace(config, block_n=max(16, config.block_n // 2))
    tiles_m = B * _boxes(box, frames, Y, X) if box else _ceil(rows, config.block_m)
    tiles_n = _ceil(N, config.block_n)
    past_parts = has_past * (config.parts * (kt - 1) or 1)
    last_parts = (source is not None) * (config.parts or 1)
    spread = config.parts > 0 and defaults.conv_spread(
        architecture, tiles_m * tiles_n, Y * X, past_parts + streams * last_parts, dot_with is not None
    )
    units = past_parts + streams * last_parts if spread else 1
    args = {
        "p_ptr": videos["p"] if has_past else none,
        "h_ptr": none if history is None else history,
        "x_ptr": none if source is None else source,
        "w_ptr": weight,
        "z_ptr": none if dot_with is None else dot_with,
        "past_scale_ptr": none if past_scale is None else past_scale.contiguous(),
        "last_scale_ptr": none if last_scale is None else last_scale.contiguous(),
        "out_ptr": none if out is None else out,
        "past_ptr": none if past is None else past,
        "dot_ptr": none if dot_with is None else like.new_empty(tiles_n, rows * streams, dtype=torch.float32),
        "part_ptr": like.new_empty(units, rows, N, dtype=torch.float32) if spread else none,
        "p_box": _video_boxes(videos["p"], box, config.block_k) if box and has_past else none,
        "x_box": _video_boxes(like, box, config.block_k) if box and source is not None else none,
        "w_box": _weight_boxes(weight, config, back) if box else none,
        **_strides("p", videos["p"], unit_k), **_strides("h", videos["h"], unit_k),
        **_strides("x", videos["x"], unit_k), **_strides("z", videos["z"], unit_z),
        "stride_wo": kt * ky * kx * Cin // unit_w, "stride_wt": Cin // unit_w,
        "rows": rows, "frames": frames, "first_frame": first_frame, "source_frames": videos["p"].shape[2],
        "Y": Y, "X": X, "K": K // unit_k, "N": N // unit_n, "streams": streams, "clean": clean,
        "past_parts": past_parts, "last_parts": max(last_parts, 1),
        "KT": kt, "KY": ky, "KX": kx,
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k,
        **dict(zip(("BF", "BY", "BX"), box or (0, 0, 0), strict=True)),
        "UNIT_K": unit_k, "UNIT_N": unit_n, "UNIT_Z": unit_z,
        "DIRECTION": BACK.value if back else AHEAD.value,
        "PAST": has_past, "LAST": source is not None, "STORE_PAST": past is not None,
        "HAS_PAST_SCALE": past_scale is not None, "HAS_LAST_SCALE": last_scale is not None,
        "STORE_OUT": out is not None, "DOT": dot_with is not None, "HAS_HISTORY": has_past and history is not None,
        "PARTS": config.parts > 0, "SPREAD": spread,
        "WHOLE": K % config.block_k == 0 and N % config.block_n == 0,
        "WIDE": _wide(*videos.values(), weight, out, past), "PRECISION": _precision(like.dtype),
    }  # fmt: skip
    launches = [_launch(causal_conv3d_kernel, (tiles_m * tiles_n, units), args, config)]
    if spread:
        launches[0].args.update(dict.fromkeys(("z_ptr", "out_ptr", "past_ptr", "dot_ptr"), none))
        # The same columns: the dot products of a row are one sum for each tile of them.
        combine = args | {"BM": 32}
        programs = _ceil(rows, combine["BM"]) * tiles_n
        launches.append(_launch(causal_conv3d_combine_kernel, (programs, 1), combine, config))
    return launches


# Pixels in boxes for each pixel of a clip up to which boxes are taken: what they save is arithmetic of addresses and
# masks, not products (`configs` has the counts). The batch has no say: no row's result may depend on it.
BOX_WASTE = 1.125


def _box(pixels: int, frames: int, Y: int, X: int) -> tuple[int, int, int] | None:
    """The box of a tile of `pixels`; None if boxes would be too much border."""
    box = defaults.conv_box(pixels, Y, X)
    return box if _boxes(box, frames, Y, X) * pixels <= BOX_WASTE * frames * Y * X else None


def _boxes(box: tuple[int, int, int], frames: int, Y: int, X: int) -> int:
    """Boxes that cover a clip."""
    return _ceil(frames, box[0]) * _ceil(Y, box[1]) * _ceil(X, box[2])


def _has_strides(video: torch.Tensor) -> bool:
    """Whether a descriptor can address the video: no dimension is read again and again."""
    return all(stride > 0 for size, stride in zip(video.shape, video.stride(), strict=True) if size > 1)


def _video_boxes(video: torch.Tensor, box: tuple[int, int, int], channels: int) -> TensorDescriptor:
    """The video as (B, F, Y, X, C), in boxes of one batch item."""
    order = (0, 2, 3, 4)
    unit = 16 // video.element_size()
    strides = [video.stride(dim) if video.shape[dim] > 1 else unit for dim in order]
    shape = [video.shape[dim] for dim in order]
    return TensorDescriptor(video, [*shape, video.shape[1]], [*strides, 1], [1, *box, channels])


def _weight_boxes(weight: torch.Tensor, config: defaults.ConvConfig, back: bool) -> TensorDescriptor:
    """The packed weight as (Cout, taps x Cin)."""
    Cout, columns = weight.shape[0], weight[0].numel()
    block = [config.block_n, config.block_k] if back else [config.block_k, config.block_n]
    return TensorDescriptor(weight, [Cout, columns], [columns, 1], block)


def _streams_pass(
    grad, past, past_scale, last_scale, total, scaled, *, streams, frames, architecture, config=None
) -> tuple[Launch, torch.Tensor | None]:
    none = grad.new_empty(0)
    B, N, F, Y, X = grad.shape
    config = config or defaults.conv_config(architecture, grad.dtype, N, N, Y * X, "streams")
    rows = _rows_of(B, frames, Y, X, streams)
    tiles_n = _ceil(N, config.block_n)
    dot = None if past is None else grad.new_empty(tiles_n, rows * streams, dtype=torch.float32)
    unit_k, unit_n = _unit(N, grad), _unit(N, dtype=grad.dtype)
    args = {
        "g_ptr": grad, "past_ptr": none if past is None else past,
        "past_scale_ptr": none if past_scale is None else past_scale.contiguous(),
        "last_scale_ptr": none if scaled is None else last_scale.contiguous(),
        "sum_ptr": none if total is None else total, "scaled_ptr": none if scaled is None else scaled,
        "dot_ptr": none if dot is None else dot,
        **_strides("g", grad, unit_k),
        "rows": rows, "frames": frames, "Y": Y, "X": X, "N": N // unit_n, "streams": streams,
        "BM": config.block_m, "BN": config.block_n, "UNIT_K": unit_k, "UNIT_N": unit_n,
        "HAS_PAST_SCALE": past_scale is not None, "SUM": total is not None, "SCALED": scaled is not None,
        "DOT": dot is not None, "WIDE": _wide(grad, past, total, scaled),
    }  # fmt: skip
    launch = _launch(causal_conv3d_streams_kernel, (_ceil(rows, config.block_m) * tiles_n,), args, config)
    return launch, None if dot is None else dot.unflatten(1, (B, F, Y * X))


def _weight_gradient(grad, source, history, weight, parts, past, architecture, configs) -> Launch:
    """Past taps or last taps; appends its fp32 buffer (splits, Cout, taps, Cin) to parts."""
    B, _, frames, Y, X = grad.shape
    Cout, Cin, kt, ky, kx = weight.shape
    history = source if history is None else history
    unit_k, unit_n = _unit(Cout, grad), _unit(Cin, source, history)
    config = configs.get("wgrad") or defaults.conv_config(architecture, grad.dtype, Cout, Cin, Y * X, "wgrad")
    rows = _rows_of(B, frames, Y, X)
    taps = ky * kx * ((kt - 1) if past else 1)
    programs = taps * _ceil(Cout, config.block_m) * _ceil(Cin, config.block_n)
    blocks = _ceil(rows, config.block_k)
    box = None
    if config.boxes and unit_k > 1 and unit_n > 1 and _has_strides(grad) and _has_strides(source):
        box = _box(config.block_k, frames, Y, X)
    blocks = B * _boxes(box, frames, Y, X) if box else blocks
    # Enough programs for a large GPU, but no part shorter than its own cost of being written and read again.
    splits = max(1, min(_ceil(WEIGHT_PROGRAMS, programs), blocks // SPLIT_BLOCKS))
    chunk = _ceil(blocks, splits)
    splits = _ceil(blocks, chunk)
    part = grad.new_empty(splits, Cout, taps, Cin, dtype=torch.float32)
    parts.append(part)
    args = {
        "g_ptr": grad, "x_ptr": source, "h_ptr": history, "part_ptr": part,
        "g_box": _video_boxes(grad, box, config.block_m) if box else grad,
        "x_box": _video_boxes(source, box, config.block_n) if box else grad,
        **_strides("g", grad, unit_k), **_strides("x", source, unit_n), **_strides("h", history, unit_n),
        "rows": rows, "frames": frames, "Y": Y, "X": X, "K": Cout // unit_k, "N": Cin // unit_n,
        "chunk": chunk if box else chunk * config.block_k,
        "KT": kt, "KY": ky, "KX": kx, "PAST": past,
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k,
        **dict(zip(("BF", "BY", "BX"), box or (0, 0, 0), strict=True)), "UNIT_K": unit_k, "UNIT_N": unit_n,
        "WHOLE": Cout % config.block_m == 0 and Cin % config.block_n == 0,
        "WIDE": _wide(grad, source, history), "PRECISION": _precision(grad.dtype),
    }  # fmt: skip
    return _launch(causal_conv3d_weight_kernel, (splits * programs,), args, config)


# Programs that a launch of the weight gradient aims at: four for each multiprocessor of an H100.
WEIGHT_PROGRAMS = 528
SPLIT_BLOCKS = 4  # least tiles of pixels in a part


def _sum_parts(parts: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor | None:
    """The weight's gradient from its parts, like the weight; last taps without a part are zero."""
    if not parts:
        return None
    kt, ky, kx = weight.shape[2:]
    sums = [part.sum(0) for part in parts]
    taps = torch.cat(sums, 1) if len(sums) > 1 else sums[0]
    if taps.shape[1] < kt * ky * kx:
        taps = torch.cat([taps, taps.new_zeros(taps.shape[0], ky * kx, taps.shape[2])], 1)
    return torch.empty_like(weight).copy_(taps.unflatten(1, (kt, ky, kx)).permute(0, 4, 1, 2, 3))


def _sum_dots(dot: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(tiles, B, F, pixels) fp32 -> (B, F) of the dtype of x."""
    return dot.sum((0, 3)).to(x.dtype)


def _channels_last(video: torch.Tensor) -> torch.Tensor:
    """The video with its channels adjacent, itself if they are: any other strides will do."""
    if video.stride(1) == 1 or video.shape[1] == 1:
        return video
    return video.contiguous(memory_format=torch.channels_last_3d)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """The weight in memory as (Cout, kt, ky, kx, Cin)."""
    return weight.contiguous(memory_format=torch.channels_last_3d)


def _history(x: torch.Tensor, history: torch.Tensor | None, pad_value: float, kt: int) -> torch.Tensor | None:
    """The kt - 1 frames before frame 0; without history one row of channels, at stride 0 all of them."""
    if kt == 1:
        return None
    if history is not None:
        return _channels_last(history)
    B, Cin, _, Y, X = x.shape
    return x.new_full((1, Cin, 1, 1, 1), pad_value).expand(B, Cin, kt - 1, Y, X)


def _video(like: torch.Tensor, shape) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def _unit(channels: int, *videos: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    """Elements in 16 bytes if every pixel of the videos begins at a multiple of that, else 1.

    Sizes and strides handed over in this unit tell the compiler the alignment, whatever the sizes: no size selects
    another binary.
    """
    unit = 16 // (dtype or videos[0].dtype).itemsize
    strides = [s for v in videos for dim, s in enumerate(v.stride()) if dim != 1 and v.shape[dim] > 1]
    aligned = not any(stride % unit for stride in strides) and not any(v.data_ptr() % 16 for v in videos)
    return unit if aligned and channels % unit == 0 else 1


def _strides(name: str, video: torch.Tensor, unit: int) -> dict[str, int]:
    dims = {"b": 0, "f": 2, "y": 3, "x": 4}
    return {
        f"stride_{name}{letter}": video.stride(dim) // unit if video.shape[dim] > 1 else 0
        for letter, dim in dims.items()
    }


def _wide(*tensors: torch.Tensor | None) -> bool:
    """Whether an element's offset, of which parts may reach twice beyond the tensor, needs more than 32 bits."""
    return any(
        4 * sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True)) >= 2**31
        for t in tensors
        if t is not None
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _rows_of(B: int, frames: int, Y: int, X: int, streams: int = 1) -> int:
    """Pixel rows of one stream; those of all streams are counted in 32 bits."""
    if B * frames * streams * Y * X >= 2**31 - 1024:
        raise ValueError(
            "x: B * F * Y * X must be below 2**31 - 1024 for impl='triton', "
            f"got {B} * {frames * streams} * {Y} * {X} = {B * frames * streams * Y * X}"
        )
    return B * frames * Y * X


def _precision(dtype: torch.dtype) -> str:
    """TF32 where PyTorch's own convolutions would use it."""
    convolutions = getattr(torch.backends.cudnn, "conv")  # noqa: B009 (unknown to the type checker)
    return "tf32" if dtype == torch.float32 and convolutions.fp32_precision == "tf32" else "ieee"


def _launch(kernel, grid: tuple[int, ...], args: dict, config) -> Launch:
    return Launch(kernel, grid, {name: args[name] for name in kernel.arg_names}, config.num_warps, config.num_stages)
