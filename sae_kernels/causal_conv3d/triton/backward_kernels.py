"""The pass over the output gradient that the data and weight gradients of the past taps begin with."""

import triton
import triton.language as tl

from .primitives import INTEGERS, coordinates, elements, pixel_offsets


@triton.jit(do_not_specialize=INTEGERS)
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
    batch, i, y, x = coordinates(m, frames, Y, X)
    dense = (m * elements(N, UNIT_N, WIDE))[:, None] + n[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    if DOT:
        past = tl.load(past_ptr + dense, mask=ok, other=0.0).to(tl.float32)
    for stream in range(streams):
        source = pixel_offsets(
            batch, i + stream * frames, y, x, stride_gb, stride_gf, stride_gy, stride_gx, UNIT_K, WIDE
        )
        g = tl.load(g_ptr + source[:, None] + n[None, :], mask=ok, other=0.0).to(tl.float32)
        scale_index = (batch * streams + stream) * frames + i
        out_row = m + (batch * (streams - 1) + stream) * (frames * Y * X)
        if DOT:
            tl.store(dot_ptr + tile_n.to(tl.int64) * rows * streams + out_row, tl.sum(g * past, 1), mask=row_ok)
        if SCALED:
            last_scale = tl.load(last_scale_ptr + scale_index, mask=row_ok, other=0.0).to(tl.float32)
            pointers = scaled_ptr + (out_row * elements(N, UNIT_N, WIDE))[:, None] + n[None, :]
            tl.store(pointers, (g * last_scale[:, None]).to(scaled_ptr.dtype.element_ty), mask=ok)
        if SUM:
            if HAS_PAST_SCALE:
                g *= tl.load(past_scale_ptr + scale_index, mask=row_ok, other=0.0).to(tl.float32)[:, None]
            total += g
    if SUM:
        tl.store(sum_ptr + dense, total.to(sum_ptr.dtype.element_ty), mask=ok)
