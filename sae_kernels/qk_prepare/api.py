"""qk_prepare and qkv_prepare: argument checks and choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import _checks
from ..layout import FrameLayout
from . import ops, reference


def qk_prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    positions: FrameLayout | torch.Tensor | None = None,
    *,
    start: int = 0,
    grid: tuple[int, int] | None = None,
    axes: Sequence[int] | None = None,
    base: float = 10000.0,
    interleaved: bool = False,
    normalize: bool = True,
    normalize_v: bool = False,
    eps: float = 1e-4,
    impl: str = "auto",
) -> tuple[torch.Tensor, ...]:
    """Prepare heads for attention in one pass: unit RMS, then rotary embedding of absolute positions.

    With n = D, each head x of q and k becomes `R(p) @ (x / (eps + x.norm() / sqrt(n)))`. R(p) turns pair j of an axis
    of w channels by p base^(-2j/w) radians (Su et al. 2021). Angles are accurate to fp32 rounding at any position
    (below 2.4e-7 in cos and sin at position 10^6): they are reduced modulo a full turn before anything is rounded to
    fp32. Everything is computed in fp32 (fp64 for fp64), also under autocast, and rounded once. Deterministic.

    Args:
        q: (B, Hq, S, D), any strides; those with a contiguous last dimension cost no copy.
        k, v: (B, Hkv, S, D) of the dtype and device of q. v may be None; it is never turned.
        positions: where tokens are. A `FrameLayout` of S tokens: a token's position is `start` + its frame, the same
            for a frame's clean and noisy copies. An integer tensor (S,) or (B, S), or with several axes (S, A) or
            (B, S, A). None: nothing is turned.
        start: position of a layout's first frame, such as the number of cached frames.
        grid: (Y, X) of a layout's frames, Y X = tokens_per_frame: axes are then (frame, row, column).
        axes: channels of each axis, even numbers; their sum may be less than D; the last channels are then not turned.
            By default all D for one axis, and (D - 4 (D//6), 2 (D//6), 2 (D//6)) for three, as in Wan.
        base: of the frequencies.
        interleaved: pairs are channels (2j, 2j+1) instead of (j, j + R/2) of the R turned channels ("rotate_half").
            Axes take consecutive pairs in either case.
        normalize: scale q and k to unit RMS. normalize_v: v too.
        eps: added to the RMS, positive.
        impl: "auto", "reference", "composed", "cpp" (on the CPU; not for float64) or "triton". A named one is used or
            refused, never replaced.

    Returns:
        (q, k), or (q, k, v) if v was given; each is stored as (B, S, H, D) if q is, else as (B, H, S, D).

    Raises:
        ValueError: a shape, device or value breaks its rule, or `impl` cannot run here.
        TypeError: not a tensor, or not a supported or matching dtype.
    """
    _checks.check_tensor("q", q, shape="(B, Hq, S, D)")
    _checks.check_float("q", q)
    for name, tensor in (("k", k), ("v", v)) if v is not None else (("k", k),):
        _checks.check_tensor(name, tensor, shape="(B, Hkv, S, D)")
        _checks.check_like(name, tensor, "q", q)
        for dim, what in ((0, "batch"), (2, "length"), (3, "head dim")):
            _checks.check_size(name, what, tensor.shape[dim], f"{what} of q", q.shape[dim])
    if v is not None:
        _checks.check_size("v", "heads", v.shape[1], "heads of k", k.shape[1])
    tensors = (q, k, v if normalize_v else None)
    settings = _Settings(base, interleaved, normalize, normalize_v and v is not None, eps)
    out = _prepare("qk_prepare", tensors, None, positions, start, grid, axes, settings, impl)
    return out[:2] if v is None else (*out[:2], out[2] if normalize_v else v)


def qkv_prepare(
    qkv: torch.Tensor,
    positions: FrameLayout | torch.Tensor | None = None,
    *,
    kv_heads: int | None = None,
    start: int = 0,
    grid: tuple[int, int] | None = None,
    axes: Sequence[int] | None = None,
    base: float = 10000.0,
    interleaved: bool = False,
    normalize: bool = True,
    normalize_v: bool = False,
    eps: float = 1e-4,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`qk_prepare` of one linear layer's output, whose gradient is written in one piece.

    Args:
        qkv: (B, S, Hq + 2 Hkv, D): heads of q, then of k, then of v; any strides.
        kv_heads: Hkv; a third of the heads by default.
        positions and the others: as for `qk_prepare`.

    Returns:
        q (B, Hq, S, D), k and v (B, Hkv, S, D), each a transposed contiguous (B, S, H, D) tensor. v is copied if it
        is not normalised.

    Raises:
        ValueError, TypeError: as `qk_prepare`.
    """
    _checks.check_tensor("qkv", qkv, shape="(B, S, Hq + 2 Hkv, D)")
    _checks.check_float("qkv", qkv)
    heads = qkv.shape[2]
    if kv_heads is None:
        if heads % 3 or heads == 0:
            raise ValueError(f"qkv: heads must be a positive multiple of 3 without kv_heads, got {heads}")
        kv_heads = heads // 3
    elif not _checks.is_integer(kv_heads):
        raise TypeError(f"kv_heads: must be an integer, got {_checks.describe(kv_heads)}")
    elif not 1 <= kv_heads <= (heads - 1) // 2:
        raise ValueError(
            f"kv_heads: must be in [1, {(heads - 1) // 2}] with {heads} heads, got {_checks.short(kv_heads)}"
        )
    settings = _Settings(base, interleaved, normalize, normalize_v, eps)
    counts = [heads - 2 * kv_heads, kv_heads, kv_heads]
    q, k, v = _prepare(
        "qkv_prepare", (qkv.transpose(1, 2), None, None), counts, positions, start, grid, axes, settings, impl
    )
    return q, k, v


class _Settings(NamedTuple):
    base: float
    interleaved: bool
    normalize: bool
    normalize_v: bool
    eps: float


def _prepare(
    op, tensors, heads, positions, start, grid, axes, settings: _Settings, impl: str
) -> tuple[torch.Tensor, ...]:
    q, k, v = tensors
    base, interleaved, normalize, normalize_v, eps = settings
    argument, D = "q" if heads is None else "qkv", q.shape[-1]
    if D < 1:
        raise ValueError(f"{argument}: head dim must be >= 1, got {D}")
    for name, value, least in (("eps", eps, 0), ("base", base, 1)):
        number = _checks.check_number(name, value)
        if number < least or number == 0:
            raise ValueError(f"{name}: must be finite and {'>= 1' if least else '> 0'}, got {value}")
    for name, flag in (("interleaved", interleaved), ("normalize", normalize), ("normalize_v", normalize_v)):
        _checks.check_flag(name, flag)
    if positions is not None and not isinstance(positions, (FrameLayout, torch.Tensor)):
        raise TypeError(f"positions: must be a FrameLayout, a tensor or None, got {_checks.describe(positions)}")
    axes = _axes(axes, positions, grid, D)
    place = _place(argument, q, positions, start, grid)
    positions = _positions(q, positions, len(axes)) if isinstance(positions, torch.Tensor) else None

    available, why_not = ops.implementations(q.device, q.dtype, D)
    chosen = _checks.choose_implementation(op, impl, q.device, available, why_not)
    if chosen == "reference":
        if positions is None and axes:
            positions = reference.layout_positions(q.shape[2], *place, len(axes), q.device)
        parts = q.split(heads, dim=1) if heads is not None else [t for t in tensors if t is not None]
        return tuple(
            reference.prepare(
                part, positions if i < 2 else None, axes, base, interleaved, (normalize, normalize, normalize_v)[i], eps
            )
            for i, part in enumerate(parts)
        )
    if heads is None:
        heads = [q.shape[1], k.shape[1], 0 if v is None else v.shape[1]]
    options = (*place, axes, float(base), interleaved, normalize, normalize_v, float(eps), chosen)
    return ops.qk_prepare_fwd(q, k, v, positions, heads, *options)[:3]


def _axes(axes: Sequence[int] | None, positions: object, grid: object, D: int) -> list[int]:
    """Channels of each axis; none if nothing is turned."""
    if positions is None:
        if axes is not None or grid is not None:
            raise ValueError(f"axes, grid: must be None without positions, got {axes} and {grid}")
        return []
    three = isinstance(positions, FrameLayout) and grid is not None
    if axes is None:
        axes = [D - 4 * (D // 6), 2 * (D // 6), 2 * (D // 6)] if three else [D]
    axes = _checks.check_integers("axes", axes)
    if any(channels < 0 or channels % 2 for channels in axes) or not 2 <= sum(axes) <= D:
        raise ValueError(f"axes: must be even numbers that sum to between 2 and the head dim = {D}, got {tuple(axes)}")
    if isinstance(positions, FrameLayout) and len(axes) != (3 if three else 1):
        wanted = "three, (frame, row, column), for a layout with a grid" if three else "one for a layout without a grid"
        raise ValueError(f"axes: must be {wanted}, got {tuple(axes)}")
    return axes


def _place(
    name: str, q: torch.Tensor, positions: object, start: int, grid: tuple[int, int] | None
) -> tuple[int, int, int, int]:
    """(frames, tokens per frame, tokens per row, start) of a layout; frames = 0 for none."""
    _checks.check_word("start", start)
    if not isinstance(positions, FrameLayout):
        if grid is not None or start != 0:
            raise ValueError(
                f"grid, start: must be None and 0 unless positions is a FrameLayout, got {grid} and {start}"
            )
        return 0, 1, 1, 0
    _checks.check_size(name, "length", q.shape[2], "layout.sequence_length", positions.sequence_length)
    P = positions.tokens_per_frame
    if grid is None:
        return positions.frames, P, P, start
    sizes = _checks.check_integers("grid", grid)
    if len(sizes) != 2 or min(sizes) < 1 or sizes[0] * sizes[1] != P:
        raise ValueError(f"grid: must be (Y, X) with Y X = tokens_per_frame = {P}, got {_checks.short(grid)}")
    return positions.frames, P, sizes[1], start


def _positions(q: torch.Tensor, positions: torch.Tensor, axes: int) -> torch.Tensor:
    """(B or 1, S, A) int64."""
    _checks.check_dense("positions", positions)
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"positions: dtype must be int64 or int32, got {_checks.describe(positions)}")
    if positions.device != q.device:
        raise ValueError(f"positions: must be on the device of q ({q.device}), got {_checks.describe(positions)}")
    B, _, S, _ = q.shape
    tail = (axes,) if axes > 1 else ()
    if positions.shape not in ((S, *tail), (B, S, *tail)):
        raise ValueError(
            f"positions: must have shape {(S, *tail)} or {(B, S, *tail)}, got {_checks.describe(positions)}"
        )
    positions = positions if positions.ndim == 2 + len(tail) else positions[None]
    positions = positions if tail else positions[..., None]
    return positions.to(torch.int64).contiguous()
