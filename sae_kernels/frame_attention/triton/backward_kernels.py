"""The backward kernels: delta of every row, dq of a tile of rows, dk and dv of a tile of keys."""

import triton
import triton.language as tl

from .primitives import (
    INTEGERS,
    LOG2E,
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
def frame_attention_bwd_delta_kernel(
    out_ptr, grad_ptr, delta_ptr,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_os: tl.int64,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gs: tl.int64,
    heads: tl.int32, rows: tl.int32,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """delta = sum over D of out * grad, fp32, for each row."""
    tiles = tl.cdiv(rows, BM)
    head = tl.program_id(0) // tiles
    first_row = tl.program_id(0) % tiles * BM
    batch = head // heads
    q_head = head % heads
    dims = tl.arange(0, BD)
    row_index = tl.arange(0, BM)
    row_ok = first_row + row_index < rows
    out_at = heads_of(out_ptr, stride_ob, stride_oh, stride_os, batch, row_index, UNIT, WIDE, False)
    grad_at = heads_of(grad_ptr, stride_gb, stride_gh, stride_gs, batch, row_index, UNIT, WIDE, False)
    out = load_tile(out_ptr, out_at, q_head, first_row, row_ok, dims, D, BD, BM, True, False)
    grad = load_tile(grad_ptr, grad_at, q_head, first_row, row_ok, dims, D, BD, BM, True, False)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * rows + first_row + row_index, delta, mask=row_ok)


@triton.jit(do_not_specialize=INTEGERS)
def frame_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vs: tl.int64,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gs: tl.int64,
    stride_dqb: tl.int64, stride_dqh: tl.int64, stride_dqs: tl.int64,
    heads: tl.int32, group: tl.int32, all_heads: tl.int32, section: tl.int32, rows: tl.int32,
    N: tl.int32, U: tl.int32, W: tl.int32, sink: tl.int32, copies: tl.int32, clean_rows: tl.int32,
    clean_row: tl.int32, noisy_row: tl.int32, clean_key: tl.int32, noisy_key: tl.int32,
    scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows: ds = p * (grad v^T - delta), dq = scale * ds k."""
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
    grad_at = heads_of(grad_ptr, stride_gb, stride_gh, stride_gs, batch, row_index, UNIT, WIDE, TMA)
    k_at = heads_of(k_ptr, stride_kb, stride_kh, stride_ks, batch, key_index, UNIT, WIDE, TMA)
    v_at = heads_of(v_ptr, stride_vb, stride_vh, stride_vs, batch, key_index, UNIT, WIDE, TMA)
    q = load_tile(q_ptr, q_at, q_head, memory_row, row_ok, dims, D, BD, BM, True, TMA)
    grad = load_tile(grad_ptr, grad_at, q_head, memory_row, row_ok, dims, D, BD, BM, True, TMA)
    statistics = head.to(tl.int64) * rows + memory_row + row_index
    lse2 = tl.load(lse_ptr + statistics, mask=row_ok, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + statistics, mask=row_ok, other=0.0)
    qk_scale = scale * LOG2E

    last_row = tl.minimum(first_row + BM, N) - 1
    n_sink, n_past, past, n_own, own, own_end, m_sink, sink_end, m_front, front, m_back, back, past_end, m_own = (
        row_work(first_row, last_row, is_noisy, N, U, W, sink, BN, HAS_WINDOW)
    )
    row_block = tl.minimum(first_row + row_index, last_row) // U * U
    dq = tl.zeros([BM, BD], tl.float32)
    again = True
    for CAREFUL in tl.static_range(1 + TMA):
        if again:
            dq = tl.zeros([BM, BD], tl.float32)
            for i in range(n_sink + n_past + n_own):
                key = full_tile(i, n_sink, n_past, past, own, own_key, clean_key, BN)
                k = load_tile(k_ptr, k_at, k_head, key, row_ok, dims, D, BD, BN, False, TMA)
                v = load_tile(v_ptr, v_at, k_head, key, row_ok, dims, D, BD, BN, False, TMA)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                p = tl.exp2(scores * qk_scale - lse2[:, None])
                dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                ds = p * (dp - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

            for i in range(m_sink + m_front + m_back + m_own):
                key, end, is_own = masked_tile(
                    i, n_sink, n_own, own, own_end, m_sink, sink_end, m_front, front, past, m_back, back, past_end, BN
                )
                keys = key + key_index
                key_ok = keys < end
                key = tl.where(is_own, own_key, clean_key) + key
                k = load_tile(k_ptr, k_at, k_head, key, key_ok, dims, D, BD, BN, True, TMA)
                v = load_tile(v_ptr, v_at, k_head, key, key_ok, dims, D, BD, BN, True, TMA)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                visible = sees(row_block, keys, end, is_own, is_noisy, U, W, sink, HAS_WINDOW)
                p = tl.exp2(scores * qk_scale - lse2[:, None])
                dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                # The whole product is masked, not only p: dp of hidden keys may overflow.
                ds, k = set_apart(tl.where(visible, p * (dp - delta[:, None]), 0.0), visible, k, CAREFUL)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            if TMA:
                again = has_nan(dq)

    dq_base = dq_ptr + corner(batch, q_head, memory_row, stride_dqb, stride_dqh, stride_dqs, UNIT)
    store_tile(
        dq_base,
        offsets_of(row_index, stride_dqs, UNIT, WIDE),
        row_ok,
        dims,
        (dq * scale).to(dq_ptr.dtype.element_ty),
        D,
    )


@triton.jit
def _reader_work(start, full_start, full_end, end, BM: tl.constexpr):
    """Rows [start, end) of one stream read a tile of keys, [full_start, full_end) the whole of it.

    Returns the numbers of tiles (full, front, back) and where the back ones start.
    """
    n_full = tl.maximum(full_end - full_start, 0) // BM
    n_front = tl.cdiv(full_start - start, BM)
    back = full_start + n_full * BM
    return n_full, n_front, tl.cdiv(end - back, BM), back


@triton.jit(do_not_specialize=INTEGERS)
def frame_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qs: tl.int64,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_ks: tl.int64,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vs: tl.int64,
    stride_gb: tl.int64, stride_gh: tl.int64, stride_gs: tl.int64,
    stride_dkb: tl.int64, stride_dkh: tl.int64, stride_dks: tl.int64,
    stride_dvb: tl.int64, stride_dvh: tl.int64, stride_dvs: tl.int64,
    heads: tl.int32, group: tl.int32, all_heads: tl.int32, section: tl.int32, rows: tl.int32,
    N: tl.int32, U: tl.int32, W: tl.int32, sink: tl.int32, copies: tl.int32, clean_rows: tl.int32,
    clean_row: tl.int32, noisy_row: tl.int32, clean_key: tl.int32, noisy_key: tl.int32,
    scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, over every query head that shares them. heads and all_heads count key heads.

    A clean tile is read by two kinds of rows: the clean ones (kind x) and those of every noisy copy (kind y, `copies`
    times). A noisy tile is read by its own copy's rows alone (kind x).
    """
    tiles = tl.cdiv(N, BN)
    slot, head = place_of(tl.program_id(0), tiles * (1 + copies), all_heads, section)
    # The earliest clean keys have the most readers; noisy keys have few and come last.
    first_key = slot % tiles * BN
    copy = slot // tiles - 1
    is_noisy = copy >= 0
    key_start = tl.where(is_noisy, noisy_key + copy * N, clean_key)
    x_base = tl.where(is_noisy, noisy_row + copy * N, clean_row)
    x_count = tl.where(is_noisy, 1, clean_rows)
    y_count = tl.where(is_noisy, 0, copies)

    batch = head // heads
    k_head = head % heads
    dims = tl.arange(0, BD)
    row_index = tl.arange(0, BM)
    key_index = tl.arange(0, BN)
    key_ok = first_key + key_index < N
    memory_key = key_start + first_key
    k_at = heads_of(k_ptr, stride_kb, stride_kh, stride_ks, batch, key_index, UNIT, WIDE, TMA)
    v_at = heads_of(v_ptr, stride_vb, stride_vh, stride_vs, batch, key_index, UNIT, WIDE, TMA)
    q_at = heads_of(q_ptr, stride_qb, stride_qh, stride_qs, batch, row_index, UNIT, WIDE, TMA)
    grad_at = heads_of(grad_ptr, stride_gb, stride_gh, stride_gs, batch, row_index, UNIT, WIDE, TMA)
    k = load_tile(k_ptr, k_at, k_head, memory_key, key_ok, dims, D, BD, BN, True, TMA)
    v = load_tile(v_ptr, v_at, k_head, memory_key, key_ok, dims, D, BD, BN, True, TMA)
    qk_scale = scale * LOG2E

    last_key = tl.minimum(first_key + BN, N) - 1
    first = first_key // U * U
    last = last_key // U * U
    key_block = tl.minimum(first_key + key_index, last_key) // U * U
    # A key of block j is read up to block j + window, and up to the last one when j is in the sink.
    past_full_end = N
    past_end = N
    upper = tl.zeros([BN], tl.int32) + N
    if HAS_WINDOW:
        past_full_end = tl.where(last < sink, N, tl.minimum(first + W + U, N))
        past_end = tl.where(first < sink, N, tl.minimum(last + W + U, N))
        upper = tl.where(key_block < sink, N, key_block + W + U)
    own_end = tl.minimum(last + U, N)
    x_full_start = tl.where(is_noisy & (first < last), own_end, last)
    x_end = tl.where(is_noisy, own_end, past_end)
    upper = tl.where(is_noisy, key_block + U, upper)
    x_full, x_front, x_backs, x_back = _reader_work(
        first, x_full_start, tl.where(is_noisy, own_end, past_full_end), x_end, BM
    )
    y_start = tl.minimum(first + U, N)
    y_full_start = tl.minimum(last + U, N)
    y_full, y_front, y_backs, y_back = _reader_work(y_start, y_full_start, past_full_end, past_end, BM)

    x_tiles = x_full * x_count
    head_tiles = x_tiles + y_full * y_count
    x_masked = (x_front + x_backs) * x_count
    y_masked = y_front + y_backs
    head_masked = x_masked + y_masked * y_count
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    again = True
    for CAREFUL in tl.static_range(1 + TMA):
        if again:
            dk = tl.zeros([BN, BD], tl.float32)
            dv = tl.zeros([BN, BD], tl.float32)
            for i in range(group * head_tiles):
                member = i // tl.maximum(head_tiles, 1)
                j = i - member * head_tiles
                in_y = j - x_tiles
                y_copy = in_y // tl.maximum(y_full, 1)
                x_row = x_base + x_full_start + j * BM
                y_row = noisy_row + y_copy * N + y_full_start + (in_y - y_copy * y_full) * BM
                row = tl.where(in_y < 0, x_row, y_row)
                q_head = k_head * group + member
                statistics = (head.to(tl.int64) * group + member) * rows + row + row_index
                q = load_tile(q_ptr, q_at, q_head, row, key_ok, dims, D, BD, BM, False, TMA)
                grad = load_tile(grad_ptr, grad_at, q_head, row, key_ok, dims, D, BD, BM, False, TMA)
                # lse and delta are read where they are used; read earlier, they would cost 32 registers per thread.
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                lse2 = tl.load(lse_ptr + statistics) * LOG2E
                p = tl.exp2(scores * qk_scale - lse2[None, :])
                dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
                dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                ds = p * (dp - tl.load(delta_ptr + statistics)[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

            for i in range(group * head_masked):
                member = i // tl.maximum(head_masked, 1)
                j = i - member * head_masked
                in_y = j - x_masked
                is_y = in_y >= 0
                y_copy = in_y // tl.maximum(y_masked, 1)
                j = tl.where(is_y, in_y - y_copy * y_masked, j)
                in_back = j - tl.where(is_y, y_front, x_front)
                front_row = tl.where(is_y, y_start, first) + j * BM
                back_row = tl.where(is_y, y_back, x_back) + in_back * BM
                row = tl.where(in_back < 0, front_row, back_row)
                front_end = tl.where(is_y, y_full_start, x_full_start)
                end = tl.where(in_back < 0, front_end, tl.where(is_y, past_end, x_end))
                row_in_stream = row + row_index
                row_ok = row_in_stream < end
                row = tl.where(is_y, noisy_row + y_copy * N, x_base) + row
                q_head = k_head * group + member
                statistics = (head.to(tl.int64) * group + member) * rows + row + row_index
                q = load_tile(q_ptr, q_at, q_head, row, row_ok, dims, D, BD, BM, True, TMA)
                grad = load_tile(grad_ptr, grad_at, q_head, row, row_ok, dims, D, BD, BM, True, TMA)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                lse2 = tl.load(lse_ptr + statistics, mask=row_ok, other=0.0) * LOG2E
                lower = key_block + tl.where(is_y, U, 0)
                visible = (row_in_stream[None, :] >= lower[:, None]) & (
                    row_in_stream[None, :] < tl.minimum(upper, end)[:, None]
                )
                p = tl.where(visible, tl.exp2(scores * qk_scale - lse2[None, :]), 0.0)
                seen_p, seen_grad = set_apart(p, visible, grad, CAREFUL)
                dv = tl.dot(seen_p.to(grad.dtype), seen_grad, dv, input_precision=PRECISION)
                dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                delta = tl.load(delta_ptr + statistics, mask=row_ok, other=0.0)
                ds, q = set_apart(tl.where(visible, p * (dp - delta[None, :]), 0.0), visible, q, CAREFUL)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if TMA:
                again = has_nan(dk) | has_nan(dv)

    dk_base = dk_ptr + corner(batch, k_head, memory_key, stride_dkb, stride_dkh, stride_dks, UNIT)
    dv_base = dv_ptr + corner(batch, k_head, memory_key, stride_dvb, stride_dvh, stride_dvs, UNIT)
    store_tile(
        dk_base,
        offsets_of(key_index, stride_dks, UNIT, WIDE),
        key_ok,
        dims,
        (dk * scale).to(dk_ptr.dtype.element_ty),
        D,
    )
    store_tile(dv_base, offsets_of(key_index, stride_dvs, UNIT, WIDE), key_ok, dims, dv.to(dv_ptr.dtype.element_ty), D)
