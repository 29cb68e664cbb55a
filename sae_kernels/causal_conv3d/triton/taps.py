"""The sum over taps and channels of a tile: past taps and last taps, through pointers or in boxes."""

import triton
import triton.language as tl

from .primitives import AHEAD, BACK, choose, distance, elements, pixel_offsets


@triton.jit
def accumulate(
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
        w_rows = n * elements(stride_wo, UNIT_K, WIDE)
    else:
        w_rows = channel * elements(stride_wo, UNIT_N, WIDE)
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
        offset = source + elements(dy * stride_y + dx * stride_x - lag * stride_f, UNIT_K, WIDE)
        if HISTORY:
            ok = ok & (frame < lag)
            offset = history + elements(dy * stride_hy + dx * stride_hx - lag * stride_hf, UNIT_K, WIDE)
        elif PAST:
            if DIRECTION == BACK:
                offset_h = history + elements(dy * stride_hy + dx * stride_hx - lag * stride_hf, UNIT_K, WIDE)
                offset = choose(frame >= lag, offset, h_from_p * UNIT_K + offset_h)
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
def accumulate_boxes(
    acc, begin, end, video, weight, batch, frame, y, x, n, K, N,
    PAST: tl.constexpr, KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
    DIRECTION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`accumulate` over the box that begins at (batch, frame, y, x): what lies outside of the video is zero.

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
        # that are not stored.
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
def sum_past(
    acc, part, end_part, parts, p_ptr, p_box, h_ptr, w_ptr, w_box, batch, past_frame, y, x, row_ok, n,
    box_b, box_frame, box_y, box_x, box_n, source_frames, Y, X, K, N,
    stride_pb, stride_pf, stride_py, stride_px, stride_hb, stride_hf, stride_hy, stride_hx, stride_wo, stride_wt,
    KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BX: tl.constexpr,
    UNIT_K: tl.constexpr, UNIT_N: tl.constexpr, DIRECTION: tl.constexpr, PARTS: tl.constexpr,
    HAS_HISTORY: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + parts part..end_part of the past taps of a tile; without PARTS there is but one."""
    history = pixel_offsets(batch, past_frame + KT - 1, y, x, stride_hb, stride_hf, stride_hy, stride_hx, UNIT_K, WIDE)
    in_time_tap = tl.cdiv(K * UNIT_K, BK) * KY * KX
    steps = in_time_tap * (KT - 1)
    chunk = tl.cdiv(steps, parts)
    # Without PARTS the sum continues in acc itself.
    for index in range(part, end_part if PARTS else part + 1):
        begin = tl.minimum(index * chunk, steps)
        end = tl.minimum(begin + chunk, steps) if PARTS else steps * end_part
        summed = tl.zeros([BM, BN], tl.float32) if PARTS else acc
        if BX == 0:
            source = pixel_offsets(batch, past_frame, y, x, stride_pb, stride_pf, stride_py, stride_px, UNIT_K, WIDE)
            summed = accumulate(
                summed, begin, end, p_ptr, source, distance(h_ptr, p_ptr, UNIT_K), history,
                past_frame, y, x, row_ok, w_ptr, n, source_frames, Y, X, K, N,
                stride_pf, stride_py, stride_px, stride_hf, stride_hy, stride_hx, stride_wo, stride_wt,
                True, False, KT, KY, KX, BM, BN, BK, UNIT_K, UNIT_N, DIRECTION, WHOLE, WIDE, PRECISION,
            )  # fmt: skip
        else:
            # Time tap t of frame i reads frame i - (KT - 1 - t). Frames of one box pass from history to the clip at
            # different taps, each once: all of history first keeps the order of every row's sum.
            if HAS_HISTORY:
                summed = accumulate(
                    summed, begin, tl.minimum(end, tl.maximum(KT - 1 - box_frame, 0) * in_time_tap),
                    h_ptr, history, 0, history, past_frame, y, x, row_ok, w_ptr, n, source_frames, Y, X, K, N,
                    stride_hf, stride_hy, stride_hx, stride_hf, stride_hy, stride_hx, stride_wo, stride_wt,
                    True, True, KT, KY, KX, BM, BN, BK, UNIT_K, UNIT_N, DIRECTION, WHOLE, WIDE, PRECISION,
                )  # fmt: skip
                begin = tl.maximum(begin, (KT - box_frame - BF) * in_time_tap)
            summed = accumulate_boxes(
                summed, begin, end, p_box, w_box, box_b, box_frame, box_y, box_x, box_n, K, N,
                True, KT, KY, KX, BM, BN, BK, UNIT_K, UNIT_N, DIRECTION, PRECISION,
            )  # fmt: skip
        acc = acc + summed if PARTS else summed
    return acc


@triton.jit
def sum_last(
    acc, part, end_part, parts, x_ptr, x_box, w_ptr, w_box, batch, frame, y, x, row_ok, n,
    box_b, box_frame, box_y, box_x, box_n, Y, X, K, N,
    stride_xb, stride_xf, stride_xy, stride_xx, stride_wo, stride_wt,
    KT: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr,
    UNIT_K: tl.constexpr, UNIT_N: tl.constexpr, DIRECTION: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + parts part..end_part of the last taps of a tile; without PARTS there is but one."""
    source = pixel_offsets(batch, frame, y, x, stride_xb, stride_xf, stride_xy, stride_xx, UNIT_K, WIDE)
    steps = tl.cdiv(K * UNIT_K, BK) * KY * KX
    chunk = tl.cdiv(steps, parts)
    for index in range(part, end_part if PARTS else part + 1):
        begin = tl.minimum(index * chunk, steps)
        end = tl.minimum(begin + chunk, steps)
        summed = tl.zeros([BM, BN], tl.float32) if PARTS else acc
        if BX == 0:
            summed = accumulate(
                summed, begin, end, x_ptr, source, 0, source, frame, y, x, row_ok, w_ptr, n, 0, Y, X, K, N,
                stride_xf, stride_xy, stride_xx, stride_xf, stride_xy, stride_xx, stride_wo, stride_wt,
                False, False, KT, KY, KX, BM, BN, BK, UNIT_K, UNIT_N, DIRECTION, WHOLE, WIDE, PRECISION,
            )  # fmt: skip
        else:
            summed = accumulate_boxes(
                summed, begin, end, x_box, w_box, box_b, box_frame, box_y, box_x, box_n, K, N,
                False, KT, KY, KX, BM, BN, BK, UNIT_K, UNIT_N, DIRECTION, PRECISION,
            )  # fmt: skip
        acc = acc + summed if PARTS else summed
    return acc
