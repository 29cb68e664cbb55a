"""frame_attention in Triton: forward, dK/dV and dQ kernels whose work list is arithmetic on the layout's integers.

A tile of rows lies in one stream and may cut through blocks anywhere. What its rows see is at most four intervals of
keys; the part that every row sees is walked in full tiles without a mask, and only what is left is masked, by comparing
token indices with each row's own bounds. dK/dV walks the same relation from the side of a tile of keys. Each gradient
element is summed by one program in one order: no atomics, bitwise repeatable, independent of the batch.

Tiles are read through pointers, or (TMA) through tensor descriptors by the copy engine: the same tiles in the same
order, hence the same bits. A pointer's masks leave out what no row of a tile sees. A descriptor reads all of a tile;
where that let a NaN in, which shows in the result, the tile is done again with care.

Token indices count from a stream's start. N tokens in a stream, U tokens in a block, W tokens in a window,
BM rows and BN keys in a tile, D head dim, BD its next power of two. Addresses are int64.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .._launch import Launch, architecture, run
from ..layout import FrameLayout
from . import configs as defaults

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
# Below every score, yet finite: exp2(-inf - LOWEST) is 0 for a row that has seen no key, where -inf - -inf is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# Heads are walked in sections whose keys and values fit in this many bytes of L2 (50 MB on H100, shared with the rest).
SECTION_BYTES = 24 << 20

MAX_TILE = 256  # rows or keys

_INTEGERS = [
    "heads", "group", "all_heads", "section", "rows",
    "N", "U", "W", "sink", "copies", "clean_rows", "clean_row", "noisy_row", "clean_key", "noisy_key",
    *(f"stride_{tensor}{dim}" for tensor in ("q", "k", "v", "o", "g", "dq", "dk", "dv") for dim in "bhs"),
]  # fmt: skip


@triton.jit
def _place(program, slots, all_heads, section):
    """(slot, head) of a program: sections of heads in turn, in each the heaviest slots of all its heads first."""
    index = program // (section * slots)
    within = program % (section * slots)
    width = tl.minimum(section, all_heads - index * section)
    return within // width, index * section + within % width


@triton.jit
def _offsets(index, stride, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a tile's rows from its first: 32 bits save a dozen registers a thread, and hold unless WIDE."""
    if WIDE:
        return index * (stride * UNIT)
    else:
        return index * (stride * UNIT).to(tl.int32)


@triton.jit
def _heads_of(x, stride_b, stride_h, stride_s, batch, index, UNIT: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr):
    """What `_load` needs to read tiles of rows `index` [rows] from any head of one batch entry of x."""
    if TMA:
        return (batch,)
    else:
        base = x + batch.to(tl.int64) * stride_b * UNIT
        strides = (stride_h.to(tl.int64) * UNIT, stride_s.to(tl.int64) * UNIT)
        return (base, strides[0], strides[1], _offsets(index, stride_s, UNIT, WIDE))


@triton.jit
def _load(
    x, place, head, row, row_ok, dims,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, CHECK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tile [ROWS, BD] of one head from `row` of memory on; zeros beyond D.

    If CHECK, some rows are not row_ok: zeros from a pointer, from a descriptor whatever lies there, or zeros beyond the
    tensor.
    """
    if TMA:
        return tl.reshape(x.load([place[0], head, row, 0]), (ROWS, BD))
    else:
        base = place[0] + head.to(tl.int64) * place[1] + row.to(tl.int64) * place[2]
        pointers = base + place[3][:, None] + dims[None, :]
        if CHECK:
            if D == BD:
                return tl.load(pointers, mask=row_ok[:, None], other=0.0)
            else:
                return tl.load(pointers, mask=row_ok[:, None] & (dims[None, :] < D), other=0.0)
        else:
            if D == BD:
                return tl.load(pointers)
            else:
                return tl.load(pointers, mask=dims[None, :] < D, other=0.0)


@triton.jit
def _apart(weights, visible, x, CAREFUL: tl.constexpr):
    """(weights, x) for a product weights [A, B] x [B, D] in which what is not visible, of weight 0, counts nothing, not
    even 0 * nan. A row of weights that does see an infinity or a NaN of x becomes NaN.
    """
    if CAREFUL:
        finite = tl.abs(x.to(tl.float32)) < float("inf")
        bad = tl.min(finite.to(tl.int32), 1) == 0
        weights = tl.where(visible & bad[None, :], float("nan"), weights)
        x = tl.where(finite, x, tl.zeros_like(x))
    return weights, x


@triton.jit
def _has_nan(x):
    total = tl.sum(tl.sum(x, 1), 0)
    return total != total


@triton.jit
def _corner(batch, head, row, stride_b, stride_h, stride_s, UNIT: tl.constexpr):
    """Offset of a row's first element, 64 bits."""
    return (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_s) * UNIT


@triton.jit
def _store(base, row_offsets, row_ok, dims, value, D: tl.constexpr):
    mask = row_ok[:, None] & (dims[None, :] < D)
    tl.store(base + row_offsets[:, None] + dims[None, :], value, mask=mask)


@triton.jit
def _row_work(first_row, last_row, is_noisy, N, U, W, sink, BN: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The keys that rows first_row..last_row of one stream see, as numbers of tiles and where they start.

    Full tiles: n_sink from 0, n_past from past, n_own from own (own in the noisy stream, the others clean).
    Masked tiles: m_sink up to sink_end, m_front from front up to past, m_back from back up to past_end, m_own from
    own + n_own * BN up to own_end.
    """
    first = first_row // U * U
    last = last_row // U * U
    # Clean rows see their own block in the clean stream, noisy rows in their own.
    reach = tl.where(is_noisy, 0, U)
    full_end = tl.minimum(first + reach, N)
    past_end = tl.minimum(last + reach, N)
    front = 0
    past = 0
    sink_end = 0
    if HAS_WINDOW:
        front = tl.maximum(first - W, 0)
        recent = tl.maximum(last - W, 0)
        sink_end = tl.minimum(sink, front)
        n_past = tl.maximum(full_end - recent, 0) // BN
        past = tl.minimum(recent, full_end)
    else:
        n_past = full_end // BN
    n_sink = sink_end // BN
    m_sink = tl.cdiv(sink_end - n_sink * BN, BN)
    m_front = tl.cdiv(past - front, BN)
    back = past + n_past * BN
    m_back = tl.cdiv(past_end - back, BN)
    own = first
    own_end = tl.where(is_noisy, tl.minimum(last + U, N), own)
    n_own = tl.where(first == last, (own_end - own) // BN, 0)
    m_own = tl.cdiv(own_end - own - n_own * BN, BN)
    return n_sink, n_past, past, n_own, own, own_end, m_sink, sink_end, m_front, front, m_back, back, past_end, m_own


@triton.jit
def _full_tile(i, n_sink, n_past, past, own, own_key, clean_key, BN: tl.constexpr):
    """Where full tile i begins: a key index in memory."""
    in_past = i - n_sink
    in_own = in_past - n_past
    clean = tl.where(in_past < 0, i * BN, past + in_past * BN)
    return tl.where(in_own < 0, clean_key + clean, own_key + own + in_own * BN)


@triton.jit
def _masked_tile(
    i, n_sink, n_own, own, own_end, m_sink, sink_end, m_front, front, past, m_back, back, past_end, BN: tl.constexpr
):
    """(first key, end, is_own) of masked tile i, in the stream's own count."""
    in_front = i - m_sink
    in_back = in_front - m_front
    in_own = in_back - m_back
    key = (n_sink + i) * BN
    end = sink_end
    key = tl.where(in_front < 0, key, front + in_front * BN)
    end = tl.where(in_front < 0, end, past)
    key = tl.where(in_back < 0, key, back + in_back * BN)
    end = tl.where(in_back < 0, end, past_end)
    key = tl.where(in_own < 0, key, own + (n_own + in_own) * BN)
    end = tl.where(in_own < 0, end, own_end)
    return key, end, in_own >= 0


@triton.jit
def _sees(row_block, keys, end, is_own, is_noisy, U, W, sink, HAS_WINDOW: tl.constexpr):
    """Bool [BM, BN]: row_block [BM] is the first token of each row's block, keys [BN]."""
    reach = tl.where(is_own | (is_noisy == 0), U, 0)
    upper = tl.minimum(row_block + reach, end)
    visible = keys[None, :] < upper[:, None]
    if HAS_WINDOW:
        lower = row_block - tl.where(is_own, 0, W)
        kept = tl.where(is_own, 0, sink)
        visible = visible & ((keys[None, :] >= lower[:, None]) | (keys[None, :] < kept))
    else:
        lower = tl.where(is_own, row_block, 0)
        visible = visible & (keys[None, :] >= lower[:, None])
    return visible


@triton.jit(do_not_specialize=_INTEGERS)
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
    slot, head = _place(tl.program_id(0), tiles * streams, all_heads, section)
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
    q_at = _heads_of(q_ptr, stride_qb, stride_qh, stride_qs, batch, row_index, UNIT, WIDE, TMA)
    k_at = _heads_of(k_ptr, stride_kb, stride_kh, stride_ks, batch, key_index, UNIT, WIDE, TMA)
    v_at = _heads_of(v_ptr, stride_vb, stride_vh, stride_vs, batch, key_index, UNIT, WIDE, TMA)
    q = _load(q_ptr, q_at, q_head, memory_row, row_ok, dims, D, BD, BM, True, TMA)
    if NEGATIVE:
        q = (-q).to(q.dtype)
    qk_scale = scale * LOG2E

    last_row = tl.minimum(first_row + BM, N) - 1
    n_sink, n_past, past, n_own, own, own_end, m_sink, sink_end, m_front, front, m_back, back, past_end, m_own = (
        _row_work(first_row, last_row, is_noisy, N, U, W, sink, BN, HAS_WINDOW)
    )
    row_block = tl.minimum(first_row + row_index, last_row) // U * U
    highest = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    again = True
    # A descriptor reads whole tiles, whatever lies in them: where 0 * nan has made a NaN, a second time with care.
    for CAREFUL in tl.static_range(1 + TMA):
        if again:
            highest = tl.full([BM], LOWEST, tl.float32)
            total = tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, BD], tl.float32)
            for i in range(n_sink + n_past + n_own):
                key = _full_tile(i, n_sink, n_past, past, own, own_key, clean_key, BN)
                k = _load(k_ptr, k_at, k_head, key, row_ok, dims, D, BD, BN, False, TMA)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                new_highest = tl.maximum(highest, tl.max(scores, 1) * qk_scale)
                p = tl.exp2(scores * qk_scale - new_highest[:, None])
                decay = tl.exp2(highest - new_highest)
                v = _load(v_ptr, v_at, k_head, key, row_ok, dims, D, BD, BN, False, TMA)
                total = total * decay + tl.sum(p, 1)
                acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
                highest = new_highest

            for i in range(m_sink + m_front + m_back + m_own):
                key, end, is_own = _masked_tile(
                    i, n_sink, n_own, own, own_end, m_sink, sink_end, m_front, front, past, m_back, back, past_end, BN
                )
                keys = key + key_index
                key_ok = keys < end
                key = tl.where(is_own, own_key, clean_key) + key
                k = _load(k_ptr, k_at, k_head, key, key_ok, dims, D, BD, BN, True, TMA)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale
                visible = _sees(row_block, keys, end, is_own, is_noisy, U, W, sink, HAS_WINDOW)
                scores = tl.where(visible, scores, float("-inf"))
                new_highest = tl.maximum(highest, tl.max(scores, 1))
                p = tl.exp2(scores - new_highest[:, None])
                decay = tl.exp2(highest - new_highest)
                v = _load(v_ptr, v_at, k_head, key, key_ok, dims, D, BD, BN, True, TMA)
                total = total * decay + tl.sum(p, 1)
                p, v = _apart(p, visible, v, CAREFUL)
                acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
                highest = new_highest
            if TMA:
                again = _has_nan(acc)

    out_base = out_ptr + _corner(batch, q_head, memory_row, stride_ob, stride_oh, stride_os, UNIT)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    _store(out_base, _offsets(row_index, stride_os, UNIT, WIDE), row_ok, dims, out, D)
    lse = (highest + tl.log2(total)) * LN2
    tl.store(lse_ptr + head.to(tl.int64) * rows + memory_row + row_index, lse, mask=row_ok)


@triton.jit(do_not_specialize=_INTEGERS)
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
    out_at = _heads_of(out_ptr, stride_ob, stride_oh, stride_os, batch, row_index, UNIT, WIDE, False)
    grad_at = _heads_of(grad_ptr, stride_gb, stride_gh, stride_gs, batch, row_index, UNIT, WIDE, False)
    out = _load(out_ptr, out_at, q_head, first_row, row_ok, dims, D, BD, BM, True, False)
    grad = _load(grad_ptr, grad_at, q_head, first_row, row_ok, dims, D, BD, BM, True, False)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * rows + first_row + row_index, delta, mask=row_ok)


@triton.jit(do_not_specialize=_INTEGERS)
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
    slot, head = _place(tl.program_id(0), tiles * streams, all_heads, section)
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
    q_at = _heads_of(q_ptr, stride_qb, stride_qh, stride_qs, batch, row_index, UNIT, WIDE, TMA)
    grad_at = _heads_of(grad_ptr, stride_gb, stride_gh, stride_gs, batch, row_index, UNIT, WIDE, TMA)
    k_at = _heads_of(k_ptr, stride_kb, stride_kh, stride_ks, batch, key_index, UNIT, WIDE, TMA)
    v_at = _heads_of(v_ptr, stride_vb, stride_vh, stride_vs, batch, key_index, UNIT, WIDE, TMA)
    q = _load(q_ptr, q_at, q_head, memory_row, row_ok, dims, D, BD, BM, True, TMA)
    grad = _load(grad_ptr, grad_at, q_head, memory_row, row_ok, dims, D, BD, BM, True, TMA)
    statistics = head.to(tl.int64) * rows + memory_row + row_index
    lse2 = tl.load(lse_ptr + statistics, mask=row_ok, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + statistics, mask=row_ok, other=0.0)
    qk_scale = scale * LOG2E

    last_row = tl.minimum(first_row + BM, N) - 1
    n_sink, n_past, past, n_own, own, own_end, m_sink, sink_end, m_front, front, m_back, back, past_end, m_own = (
        _row_work(first_row, last_row, is_noisy, N, U, W, sink, BN, HAS_WINDOW)
    )
    row_block = tl.minimum(first_row + row_index, last_row) // U * U
    dq = tl.zeros([BM, BD], tl.float32)
    again = True
    for CAREFUL in tl.static_range(1 + TMA):
        if again:
            dq = tl.zeros([BM, BD], tl.float32)
            for i in range(n_sink + n_past + n_own):
                key = _full_tile(i, n_sink, n_past, past, own, own_key, clean_key, BN)
                k = _load(k_ptr, k_at, k_head, key, row_ok, dims, D, BD, BN, False, TMA)
                v = _load(v_ptr, v_at, k_head, key, row_ok, dims, D, BD, BN, False, TMA)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                p = tl.exp2(scores * qk_scale - lse2[:, None])
                dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                ds = p * (dp - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

            for i in range(m_sink + m_front + m_back + m_own):
                key, end, is_own = _masked_tile(
                    i, n_sink, n_own, own, own_end, m_sink, sink_end, m_front, front, past, m_back, back, past_end, BN
                )
                keys = key + key_index
                key_ok = keys < end
                key = tl.where(is_own, own_key, clean_key) + key
                k = _load(k_ptr, k_at, k_head, key, key_ok, dims, D, BD, BN, True, TMA)
                v = _load(v_ptr, v_at, k_head, key, key_ok, dims, D, BD, BN, True, TMA)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                visible = _sees(row_block, keys, end, is_own, is_noisy, U, W, sink, HAS_WINDOW)
                p = tl.exp2(scores * qk_scale - lse2[:, None])
                dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                # Not p but the whole product is masked: dp of what is hidden may overflow.
                ds, k = _apart(tl.where(visible, p * (dp - delta[:, None]), 0.0), visible, k, CAREFUL)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            if TMA:
                again = _has_nan(dq)

    dq_base = dq_ptr + _corner(batch, q_head, memory_row, stride_dqb, stride_dqh, stride_dqs, UNIT)
    _store(
        dq_base, _offsets(row_index, stride_dqs, UNIT, WIDE), row_ok, dims, (dq * scale).to(dq_ptr.dtype.element_ty), D
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


@triton.jit(do_not_specialize=_INTEGERS)
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
    slot, head = _place(tl.program_id(0), tiles * (1 + copies), all_heads, section)
    # The earliest clean keys have most readers; noisy keys have few and come last.
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
    k_at = _heads_of(k_ptr, stride_kb, stride_kh, stride_ks, batch, key_index, UNIT, WIDE, TMA)
    v_at = _heads_of(v_ptr, stride_vb, stride_vh, stride_vs, batch, key_index, UNIT, WIDE, TMA)
    q_at = _heads_of(q_ptr, stride_qb, stride_qh, stride_qs, batch, row_index, UNIT, WIDE, TMA)
    grad_at = _heads_of(grad_ptr, stride_gb, stride_gh, stride_gs, batch, row_index, UNIT, WIDE, TMA)
    k = _load(k_ptr, k_at, k_head, memory_key, key_ok, dims, D, BD, BN, True, TMA)
    v = _load(v_ptr, v_at, k_head, memory_key, key_ok, dims, D, BD, BN, True, TMA)
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
                q = _load(q_ptr, q_at, q_head, row, key_ok, dims, D, BD, BM, False, TMA)
                grad = _load(grad_ptr, grad_at, q_head, row, key_ok, dims, D, BD, BM, False, TMA)
                # lse and delta are read where they are used: read earlier, they cost 32 registers a thread.
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
                q = _load(q_ptr, q_at, q_head, row, row_ok, dims, D, BD, BM, True, TMA)
                grad = _load(grad_ptr, grad_at, q_head, row, row_ok, dims, D, BD, BM, True, TMA)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                lse2 = tl.load(lse_ptr + statistics, mask=row_ok, other=0.0) * LOG2E
                lower = key_block + tl.where(is_y, U, 0)
                visible = (row_in_stream[None, :] >= lower[:, None]) & (
                    row_in_stream[None, :] < tl.minimum(upper, end)[:, None]
                )
                p = tl.where(visible, tl.exp2(scores * qk_scale - lse2[None, :]), 0.0)
                seen_p, seen_grad = _apart(p, visible, grad, CAREFUL)
                dv = tl.dot(seen_p.to(grad.dtype), seen_grad, dv, input_precision=PRECISION)
                dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                delta = tl.load(delta_ptr + statistics, mask=row_ok, other=0.0)
                ds, q = _apart(tl.where(visible, p * (dp - delta[None, :]), 0.0), visible, q, CAREFUL)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if TMA:
                again = _has_nan(dk) | _has_nan(dv)

    dk_base = dk_ptr + _corner(batch, k_head, memory_key, stride_dkb, stride_dkh, stride_dks, UNIT)
    dv_base = dv_ptr + _corner(batch, k_head, memory_key, stride_dvb, stride_dvh, stride_dvs, UNIT)
    _store(
        dk_base, _offsets(key_index, stride_dks, UNIT, WIDE), key_ok, dims, (dk * scale).to(dk_ptr.dtype.element_ty), D
    )
    _store(dv_base, _offsets(key_index, stride_dvs, UNIT, WIDE), key_ok, dims, dv.to(dv_ptr.dtype.element_ty), D)


@dataclass(frozen=True)
class Geometry:
    """The layout in the integers the kernels take; names as in the module docstring."""

    N: int
    U: int
    W: int
    sink: int
    copies: int
    clean_rows: int  # streams of clean rows in q: 1, or 0 with noisy_queries_only
    clean_row: int  # where the clean rows begin in q, and so on
    noisy_row: int
    clean_key: int
    noisy_key: int

    @staticmethod
    def of(layout: FrameLayout, noisy_queries_only: bool) -> "Geometry":
        stream = layout.frames * layout.tokens_per_frame
        # Blocks longer than the clip, and windows longer than the clip, are the clip: products stay below 2^31.
        block = min(layout.frames_per_block, layout.frames) * layout.tokens_per_frame
        blocks = layout.num_blocks
        return Geometry(
            N=stream,
            U=block,
            W=min(blocks if layout.window is None else layout.window, blocks) * block,
            sink=min(layout.sink, blocks) * block,
            copies=layout.noisy_copies,
            clean_rows=0 if noisy_queries_only else 1,
            clean_row=layout.clean_start * layout.tokens_per_frame,
            noisy_row=0 if noisy_queries_only else layout.noisy_start * layout.tokens_per_frame,
            clean_key=layout.clean_start * layout.tokens_per_frame,
            noisy_key=layout.noisy_start * layout.tokens_per_frame,
        )


def forward(q, k, v, out, lse, layout: FrameLayout, scale: float, noisy_queries_only: bool, config=None) -> None:
    """Fill out (like q) and lse (B, Hq, Sq)."""
    run(plan_forward(q, k, v, out, lse, layout, scale, noisy_queries_only, architecture(q.device), config), q.device)


def backward(
    grad_out,
    q,
    k,
    v,
    out,
    lse,
    dq,
    dk,
    dv,
    layout: FrameLayout,
    scale: float,
    noisy_queries_only: bool,
    configs=(None, None, None),
) -> None:
    """Fill dq, dk, dv; allocates one fp32 number for each row. `configs`: of delta, dk/dv and dq."""
    delta = torch.empty_like(lse)
    launches = plan_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        delta,
        dq,
        dk,
        dv,
        layout,
        scale,
        noisy_queries_only,
        architecture(q.device),
        configs,
    )
    run(launches, q.device)


def plan_forward(q, k, v, out, lse, layout, scale, noisy_queries_only, architecture, config=None) -> list[Launch]:
    """The launches of `forward` for an architecture (compute capability * 10); tensors may be meta tensors."""
    shared, geometry = _shared(layout, noisy_queries_only, scale, (q, k, v, out), q=q, k=k, v=v, o=out)
    config = config or _config(q, layout, architecture, "fwd")
    args = {
        **shared,
        **_operands(config, architecture, rows={"q_ptr": q}, keys={"k_ptr": k, "v_ptr": v}),
        "out_ptr": out, "lse_ptr": lse,
        **_heads(q, k, True),
        "scale": abs(scale), "NEGATIVE": scale < 0,
    }  # fmt: skip
    slots = (geometry.clean_rows + geometry.copies) * triton.cdiv(geometry.N, config.block_m)
    return [_launch(frame_attention_fwd_kernel, slots * args["all_heads"], args, config)]


def plan_backward(
    grad_out,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dq,
    dk,
    dv,
    layout,
    scale,
    noisy_queries_only,
    architecture,
    configs=(None, None, None),
) -> list[Launch]:
    """The launches of `backward`; tensors may be meta tensors."""
    tensors = {"q": q, "k": k, "v": v, "o": out, "g": grad_out, "dq": dq, "dk": dk, "dv": dv}
    shared, geometry = _shared(layout, noisy_queries_only, scale, tensors.values(), **tensors)
    shared |= {"lse_ptr": lse, "delta_ptr": delta, "dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "scale": scale}
    by_query, by_key = shared | _heads(q, k, True), shared | _heads(q, k, False)
    config = configs[0] or _config(q, layout, architecture, "delta")
    row_tiles = triton.cdiv(q.shape[2], config.block_m)
    args = by_query | {"out_ptr": out, "grad_ptr": grad_out, "BM": config.block_m}
    launches = [_launch(frame_attention_bwd_delta_kernel, row_tiles * args["all_heads"], args, config)]
    streamed = {"rows": {"q_ptr": q, "grad_ptr": grad_out}, "keys": {"k_ptr": k, "v_ptr": v}}
    config = configs[1] or _config(q, layout, architecture, "dkdv")
    slots = (1 + geometry.copies) * triton.cdiv(geometry.N, config.block_n)
    args = by_key | _operands(config, architecture, **streamed)
    launches.append(_launch(frame_attention_bwd_dkdv_kernel, slots * args["all_heads"], args, config))
    config = configs[2] or _config(q, layout, architecture, "dq")
    slots = (geometry.clean_rows + geometry.copies) * triton.cdiv(geometry.N, config.block_m)
    args = by_query | _operands(config, architecture, **streamed)
    launches.append(_launch(frame_attention_bwd_dq_kernel, slots * args["all_heads"], args, config))
    return launches


def _shared(layout, noisy_queries_only, scale, tensors, **strided) -> tuple[dict, Geometry]:
    """Arguments common to every kernel: geometry, strides, head dim, precision."""
    q = strided["q"]
    for name, tensor in strided.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: the kernels need a contiguous last dimension, got strides {tensor.stride()}")
    if layout.sequence_length >= 2**31 - 1024:
        raise ValueError(
            f"layout: sequence_length must be below 2**31 - 1024 for impl='triton', got {layout.sequence_length}"
        )
    geometry = Geometry.of(layout, noisy_queries_only)
    # Strides are passed in units of 16 bytes where all of them allow it: the compiler then knows that every row is
    # aligned, whatever the sizes, and no size selects another binary.
    unit = 16 // q.element_size()
    if any(s % unit for t in tensors for s, size in zip(t.stride()[:3], t.shape[:3], strict=True) if size > 1):
        unit = 1
    args = {**vars(geometry)}
    for name, tensor in strided.items():
        for dim, letter in enumerate("bhs"):
            args[f"stride_{name}{letter}"] = tensor.stride(dim) // unit if tensor.shape[dim] > 1 else 0
    head_dim = q.shape[-1]
    args |= {
        "rows": q.shape[2],
        "D": head_dim,
        "BD": max(16, triton.next_power_of_2(head_dim)),
        "UNIT": unit,
        "WIDE": any(t.stride(2) * MAX_TILE >= 2**31 for t in strided.values()),
        "HAS_WINDOW": layout.window is not None,
        "PRECISION": "tf32" if q.dtype == torch.float32 and _tf32_allowed() else "ieee",
    }
    return args, geometry


def _operands(config, architecture: int, rows: dict[str, torch.Tensor], keys: dict[str, torch.Tensor]) -> dict:
    """The tensors that a kernel reads in tiles: as descriptors where the configuration wants them and all allow it."""
    args = {"BM": config.block_m, "BN": config.block_n, "TMA": False, **rows, **keys}
    if not config.descriptors or 0 < architecture < 90 or not all(map(_describable, (*rows.values(), *keys.values()))):
        return args
    args["TMA"] = True
    args |= {name: _descriptor(x, config.block_m) for name, x in rows.items()}
    return args | {name: _descriptor(x, config.block_n) for name, x in keys.items()}


def _describable(x: torch.Tensor) -> bool:
    """Whether the copy engine can address a tensor: 16-byte aligned, strides positive multiples of 16 bytes."""
    steps = [stride * x.element_size() for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and all(step % 16 == 0 and 0 < step < 2**40 for step in steps)


def _descriptor(x: torch.Tensor, tile_rows: int) -> TensorDescriptor:
    """Tiles [tile_rows, D] of x (B, H, S, D); what lies beyond S or D reads as zero.

    Coordinates count heads and tokens, so 32 bits hold them; the addresses made of them have 64.
    """
    unit = 16 // x.element_size()
    # The stride of a dimension of one entry is never used, but must be legal.
    strides = [stride if size > 1 else unit for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    width = max(16, triton.next_power_of_2(x.shape[3]))
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, tile_rows, width])


def _heads(q: torch.Tensor, k: torch.Tensor, by_query: bool) -> dict[str, int]:
    """Head arguments of a kernel that owns query heads and streams keys past them, or the reverse."""
    group = q.shape[1] // k.shape[1]
    rows = k.shape[2] if by_query else q.shape[2] * group
    streamed_bytes = 2 * rows * q.shape[3] * q.element_size()
    sharing = group if by_query else 1
    heads = q.shape[1] if by_query else k.shape[1]
    all_heads = q.shape[0] * heads
    section = min(max(1, SECTION_BYTES // streamed_bytes) * sharing, all_heads)
    return {"heads": heads, "group": group, "all_heads": all_heads, "section": section}


def _launch(kernel, programs: int, args: dict, config) -> Launch:
    return Launch(
        kernel, (programs,), {name: args[name] for name in kernel.arg_names}, config.num_warps, config.num_stages
    )


def _config(q, layout, architecture, direction):
    block = min(layout.frames_per_block, layout.frames) * layout.tokens_per_frame
    return defaults.attention_config(architecture, q.dtype, q.shape[-1], block, direction)


def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
