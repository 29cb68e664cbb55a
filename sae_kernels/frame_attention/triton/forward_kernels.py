"""The forward kernel: out and lse of a tile of rows."""

import triton
import triton.language as tl

from .primitives import (
    INTEGERS,
    LN2,
    LOG2E,
    LOWEST,
    corner,
    full_tile,
    has_nan,
    heads_of,
    load_tile,
    masked_tile,
    offsets_of,
    place_of,
    row_work,
    sees,
    set_apart,
    store_tile,
)


@triton.jit(do_not_specialize=INTEGERS)
def frame_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vs: tl.int64,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_os: tl.int64,
    heads: tl.int32, group: tl.int32, all_heads: tl.int32, section: tl.int32, rows: tl.int32,
    N: tl.int32, U: tl.int32, W: tl.int32, sink: tl.int32, copies: tl.int32, clean_rows: tl.int32,
    clean_row: tl.int32, noisy_row: tl.int32, clean_key: tl.int32, noisy_key: tl.int32,
    scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, HAS_WINDOW: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of rows. Strides count units of UNIT elements."""
    tiles = tl.cdiv(N, BM)
    streams = clean_rows + copies
    slot, head = place_of(tl.program_id(0), tiles * streams, all_heads, section)
    first_row = (tiles - 1 - slot // streams) * BM
    copy = slot % streams - clean_rows
    is_noisy = copy >= 0
    row_start = tl.where(is_noisy, noisy_row + copy * N, clean_row)
    own_key = noisy_key + copy * N

    batch = head // heads
    q_head = head % heads
    k_head = q_head // group
    dims = tl.arange(0, BD)
    row_index = tl.arange(0, BM)
    key_index = tl.arange(0, BN)
    row_ok = first_row + row_index < N
    memory_row = row_start + first_row
    q_at = heads_of(q_ptr, stride_qb, stride_qh, stride_qs, batch, row_index, UNIT, WIDE, TMA)
    k_at = heads_of(k_ptr, stride_kb, stride_kh, stride_ks, batch, key_index, UNIT, WIDE, TMA)
    v_at = heads_of(v_ptr, stride_vb, stride_vh, stride_vs, batch, key_index, UNIT, WIDE, TMA)
    q = load_tile(q_ptr, q_at, q_head, memory_row, row_ok, dims, D, BD, BM, True, TMA)
    if NEGATIVE:
        q = (-q).to(q.dtype)
    qk_scale = scale * LOG2E

    last_row = tl.minimum(first_row + BM, N) - 1
    n_sink, n_past, past, n_own, own, own_end, m_sink, sink_end, m_front, front, m_back, back, past_end, m_own = (
        row_work(first_row, last_row, is_noisy, N, U, W, sink, BN, HAS_WINDOW)
    )
    row_block = tl.minimum(first_row + row_index, last_row) // U * U
    highest = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    again = True
    # A descriptor reads whole tiles; if 0 * nan has made a NaN, the tile is computed again with care.
    for CAREFUL in tl.static_range(1 + TMA):
        if again:
            highest = tl.full([BM], LOWEST, tl.float32)
            total = tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, BD], tl.float32)
            for i in range(n_sink + n_past + n_own):
                key = full_tile(i, n_sink, n_past, past, own, own_key, clean_key, BN)
                k = load_tile(k_ptr, k_at, k_head, key, row_ok, dims, D, BD, BN, False, TMA)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                new_highest = tl.maximum(highest, tl.max(scores, 1) * qk_scale)
                p = tl.exp2(scores * qk_scale - new_highest[:, None])
                decay = tl.exp2(highest - new_highest)
                v = load_tile(v_ptr, v_at, k_head, key, row_ok, dims, D, BD, BN, False, TMA)
                total = total * decay + tl.sum(p, 1)
                acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
                highest = new_highest

            for i in range(m_sink + m_front + m_back + m_own):
                key, end, is_own = masked_tile(
                    i, n_sink, n_own, own, own_end, m_sink, sink_end, m_front, front, past, m_back, back, past_end, BN
                )
                keys = key + key_index
                key_ok = keys < end
                key = tl.where(is_own, own_key, clean_key) + key
                k = load_tile(k_ptr, k_at, k_head, key, key_ok, dims, D, BD, BN, True, TMA)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
                visible = sees(row_block, keys, end, is_own, is_noisy, U, W, sink, HAS_WINDOW)
                scores = tl.where(visible, scores, float("-inf"))
                new_highest = tl.maximum(highest, tl.max(scores, 1))
                p = tl.exp2(scores - new_highest[:, None])
                decay = tl.exp2(highest - new_highest)
                v = load_tile(v_ptr, v_at, k_head, key, key_ok, dims, D, BD, BN, True, TMA)
                total = total * decay + tl.sum(p, 1)
                p, v = set_apart(p, visible, v, CAREFUL)
                acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
                highest = new_highest
            if TMA:
                again = has_nan(acc)

    out_base = out_ptr + corner(batch, q_head, memory_row, stride_ob, stride_oh, stride_os, UNIT)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    store_tile(out_base, offsets_of(row_index, stride_os, UNIT, WIDE), row_ok, dims, out, D)
    lse = (highest + tl.log2(total)) * LN2
    tl.store(lse_ptr + head.to(tl.int64) * rows + memory_row + row_index, lse, mask=row_ok)
