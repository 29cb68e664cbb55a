"""The convolution of one tile, all streams: forward and, with the taps mirrored, the data gradient."""

import triton
import triton.language as tl

from .primitives import AHEAD, BACK, INTEGERS, coordinates, elements, pixel_offsets, tile_of
from .taps import sum_last, sum_past


@triton.jit
def _store_dot(
    last, z_ptr, dot_ptr, stride_zb, stride_zf, stride_zy, stride_zx, rows, frames, Y, X, streams, stream, tile_n,
    m, n, row_ok, store_ok, batch, i, y, x, UNIT_Z: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """<last, z> of each row, before the scale: the tile's part of last_scale's gradient."""
    z = pixel_offsets(batch, i + stream * frames, y, x, stride_zb, stride_zf, stride_zy, stride_zx, UNIT_Z, WIDE)
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
    pointers = out_ptr + (out_row * elements(N, UNIT_N, WIDE))[:, None] + n[None, :]
    tl.store(pointers, value.to(out_ptr.dtype.element_ty), mask=store_ok)


@triton.jit(do_not_specialize=INTEGERS)
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
    m, row_ok, batch, i, y, x, box_b, box_i, box_y, box_x = tile_of(
        tl.program_id(0) // tiles_n, rows, frames, Y, X, BM, BF, BY, BX
    )
    box_n = tile_n * BN
    n = box_n + tl.arange(0, BN)
    store_ok = row_ok[:, None] & (n < N * UNIT_N)[None, :]
    past_frame = i + first_frame
    unit = tl.program_id(1)  # of the parts; without SPREAD there is one program

    past = tl.zeros([BM, BN], tl.float32)
    if PAST and (DIRECTION == BACK or SPREAD or not LAST):
        past = sum_past(
            past, unit, unit + 1 if SPREAD else past_parts, past_parts,
            p_ptr, p_box, h_ptr, w_ptr, w_box, batch, past_frame, y, x, row_ok, n,
            box_b, box_i + first_frame, box_y, box_x, box_n, source_frames, Y, X, K, N,
            stride_pb, stride_pf, stride_py, stride_px, stride_hb, stride_hf, stride_hy, stride_hx,
            stride_wo, stride_wt, KT, KY, KX, BM, BN, BK, BF, BX, UNIT_K, UNIT_N,
            DIRECTION, PARTS, HAS_HISTORY, WHOLE, WIDE, PRECISION,
        )  # fmt: skip
    if STORE_PAST and not SPREAD:
        pointers = past_ptr + (m * elements(N, UNIT_N, WIDE))[:, None] + n[None, :]
        tl.store(pointers, past.to(past_ptr.dtype.element_ty), mask=store_ok)
    if SPREAD:
        if LAST:
            own = tl.maximum(unit - past_parts, 0)
            stream = own // last_parts
            part = own - stream * last_parts
            frame = stream * frames
            past = sum_last(
                past, part, tl.where(unit < past_parts, 0, part + 1), last_parts, x_ptr, x_box, w_ptr, w_box,
                batch, i + frame, y, x, row_ok, n, box_b, box_i + frame, box_y, box_x, box_n, Y, X, K, N,
                stride_xb, stride_xf, stride_xy, stride_xx, stride_wo, stride_wt,
                KT, KY, KX, BM, BN, BK, BX, UNIT_K, UNIT_N, DIRECTION, PARTS, WHOLE, WIDE, PRECISION,
            )  # fmt: skip
        pointers = part_ptr + unit.to(tl.int64) * rows * (N * UNIT_N) + (m * elements(N, UNIT_N, WIDE))[:, None]
        tl.store(pointers + n[None, :], past, mask=store_ok)
    elif LAST:
        for stream in range(streams):
            frame = stream * frames
            acc = sum_last(
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
                    acc = sum_past(
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


@triton.jit(do_not_specialize=INTEGERS)
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
    batch, i, y, x = coordinates(m, frames, Y, X)
    plane = rows.to(tl.int64) * (N * UNIT_N)
    offset = (m * elements(N, UNIT_N, WIDE))[:, None] + n[None, :]
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
