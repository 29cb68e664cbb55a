"""Tiles, their addresses, and the keys that a tile of rows sees."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
# Below every score, yet finite: exp2(-inf - LOWEST) is 0 for a row that has seen no key, where -inf - -inf is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
INTEGERS = [
    "heads", "group", "all_heads", "section", "rows",
    "N", "U", "W", "sink", "copies", "clean_rows", "clean_row", "noisy_row", "clean_key", "noisy_key",
    *(f"stride_{tensor}{dim}" for tensor in ("q", "k", "v", "o", "g", "dq", "dk", "dv") for dim in "bhs"),
]  # fmt: skip


@triton.jit
def place_of(program, slots, all_heads, section):
    """(slot, head) of a program: sections of heads in turn, in each the heaviest slots of all its heads first."""
    index = program // (section * slots)
    within = program % (section * slots)
    width = tl.minimum(section, all_heads - index * section)
    return within // width, index * section + within % width


@triton.jit
def offsets_of(index, stride, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of a tile's rows from its first: 32 bits save a dozen registers per thread and suffice unless WIDE."""
    if WIDE:
        return index * (stride * UNIT)
    else:
        return index * (stride * UNIT).to(tl.int32)


@triton.jit
def heads_of(x, stride_b, stride_h, stride_s, batch, index, UNIT: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr):
    """What `load_tile` needs to read tiles of rows `index` [rows] from any head of a batch entry of x."""
    if TMA:
        return (batch,)
    else:
        base = x + batch.to(tl.int64) * stride_b * UNIT
        strides = (stride_h.to(tl.int64) * UNIT, stride_s.to(tl.int64) * UNIT)
        return (base, strides[0], strides[1], offsets_of(index, stride_s, UNIT, WIDE))


@triton.jit
def load_tile(
    x, place, head, row, row_ok, dims,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, CHECK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tile [ROWS, BD] of one head, from `row` in memory on; zeros beyond D.

    If CHECK, some rows are not row_ok: a pointer gives zeros, a descriptor the memory there, or zeros beyond the
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
def set_apart(weights, visible, x, CAREFUL: tl.constexpr):
    """(weights, x) for a product weights [A, B] x [B, D] in which what is not visible, of weight 0, has no effect, not
    even as 0 * nan. A row of weights that sees an infinity or a NaN of x becomes NaN.
    """
    if CAREFUL:
        finite = tl.abs(x.to(tl.float32)) < float("inf")
        bad = tl.min(finite.to(tl.int32), 1) == 0
        weights = tl.where(visible & bad[None, :], float("nan"), weights)
        x = tl.where(finite, x, tl.zeros_like(x))
    return weights, x


@triton.jit
def has_nan(x):
    total = tl.sum(tl.sum(x, 1), 0)
    return total != total


@triton.jit
def corner(batch, head, row, stride_b, stride_h, stride_s, UNIT: tl.constexpr):
    """Offset of a row's first element, 64 bits."""
    return (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + row.to(tl.int64) * stride_s) * UNIT


@triton.jit
def store_tile(base, row_offsets, row_ok, dims, value, D: tl.constexpr):
    mask = row_ok[:, None] & (dims[None, :] < D)
    tl.store(base + row_offsets[:, None] + dims[None, :], value, mask=mask)


@triton.jit
def row_work(first_row, last_row, is_noisy, N, U, W, sink, BN: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The keys that rows first_row..last_row of one stream see, as numbers of tiles and where they start.

    Full tiles: n_sink from 0, n_past from past, n_own from own (own in the noisy stream, the others clean).
    Masked tiles: m_sink up to sink_end, m_front from front up to past, m_back from back up to past_end, m_own from
    own + n_own * BN up to own_end.
    """
    first = first_row // U * U
    last = last_row // U * U
    # Clean rows see their own block in the clean stream, noisy rows see it in their own stream.
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
def full_tile(i, n_sink, n_past, past, own, own_key, clean_key, BN: tl.constexpr):
    """Where full tile i begins: a key index in memory."""
    in_past = i - n_sink
    in_own = in_past - n_past
    clean = tl.where(in_past < 0, i * BN, past + in_past * BN)
    return tl.where(in_own < 0, clean_key + clean, own_key + own + in_own * BN)


@triton.jit
def masked_tile(
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
def sees(row_block, keys, end, is_own, is_noisy, U, W, sink, HAS_WINDOW: tl.constexpr):
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
