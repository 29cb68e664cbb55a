"""The weight gradient: one GEMM over pixels for each tap."""

import triton
import triton.language as tl

from .primitives import INTEGERS, choose, coordinates, distance, elements, pixel_offsets


@triton.jit(do_not_specialize=INTEGERS)
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
    shift = elements(dy * stride_xy + dx * stride_xx - lag * stride_xf, UNIT_N, WIDE)
    shift_h = elements(dy * stride_hy + dx * stride_hx - lag * stride_hf, UNIT_N, WIDE)

    h_from_x = distance(h_ptr, x_ptr, UNIT_N)
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
            batch, i, y, x = coordinates(m, inner, Y, X)
            ok = row_ok & (y + dy >= 0) & (y + dy < Y) & (x + dx >= 0) & (x + dx < X)
            g_rows = pixel_offsets(batch, i, y, x, stride_gb, stride_gf, stride_gy, stride_gx, UNIT_K, WIDE)
            x_rows = pixel_offsets(batch, i, y, x, stride_xb, stride_xf, stride_xy, stride_xx, UNIT_N, WIDE) + shift
            if PAST:
                h_rows = pixel_offsets(
                    batch, i + KT - 1, y, x, stride_hb, stride_hf, stride_hy, stride_hx, UNIT_N, WIDE
                )
                x_rows = choose(i >= lag, x_rows, h_from_x * UNIT_N + (h_rows + shift_h))
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
