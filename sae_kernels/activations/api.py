"""Activations, sums and norms of EDM2: argument checks and choice of implementation.

Each keeps a root mean square of 1 if its inputs have it. All of them take float32, bfloat16, float16 and float64 on
any device, compute in fp32 (fp64 for fp64) also under autocast, keep the memory order of their (first) input, and are
deterministic. `impl` is "auto", "reference", "composed", "cpp" (on the CPU; not for float64) or "triton"; a named one
is used or refused, never replaced.
"""

from __future__ import annotations

import torch

from .. import _checks
from . import ops, reference


def mp_silu(x: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Magnitude-preserving SiLU: `F.silu(x) / 0.596` (EDM2, eq. 81).

    Raises:
        TypeError: x is not a tensor of a supported dtype.
        ValueError: `impl` cannot run here.
    """
    _checks.check_float_tensor("x", x)
    chosen = _choose("mp_silu", impl, x)
    return reference.mp_silu(x) if chosen == "reference" else ops.mp_silu(x, chosen)


def modulated_silu(x: torch.Tensor, scale: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """`mp_silu(x * scale)` with one scale for each frame and channel, in one pass.

    Args:
        x: (B, C, F, ...).
        scale: (B, F, C), of any supported dtype; it receives a gradient too. The result has the dtype of x.

    Raises:
        TypeError: not a tensor, or not a supported dtype.
        ValueError: shapes or devices do not match, or `impl` cannot run here.
    """
    _checks.check_float_tensor("x", x)
    _checks.check_float_tensor("scale", scale)
    if x.ndim < 3:
        raise ValueError(f"x: must have shape (B, C, F, ...), got {_checks.describe(x)}")
    B, C, F = x.shape[:3]
    if scale.shape != (B, F, C):
        raise ValueError(f"scale: must have shape (B, F, C) = {(B, F, C)}, got {_checks.describe(scale)}")
    if scale.device != x.device:
        raise ValueError(f"scale: must be on the device of x ({x.device}), got {_checks.describe(scale)}")
    chosen = _choose("modulated_silu", impl, x)
    return reference.modulated_silu(x, scale) if chosen == "reference" else ops.modulated_silu(x, scale, chosen)


def mp_sum(
    a: torch.Tensor, b: torch.Tensor, t: float | torch.Tensor, *, limit: float | None = None, impl: str = "auto"
) -> torch.Tensor:
    """Magnitude-preserving sum: `((1 - t) * a + t * b) / sqrt((1 - t)**2 + t**2)` (EDM2, eq. 88).

    Args:
        a, b: of one shape; different dtypes are promoted as torch.add does.
        t: a number, or a float tensor that broadcasts to a, such as (B, 1, F, 1, 1) for one value per frame of
            (B, C, F, Y, X); a tensor receives a gradient too. "triton" takes a number, or one value for each (dim 0,
            dim 2); "cpp" takes a number.
        limit: clamp the sum to [-limit, limit], without gradient where the limit is reached; only if t is a number.

    Raises:
        TypeError: not a tensor, or not a supported dtype.
        ValueError: shapes or devices do not match, `limit` is not positive or t a tensor, or `impl` cannot run here.
    """
    a, b = _check_pair(a, b)
    if a.shape != b.shape:
        raise ValueError(f"b: must have the shape of a {tuple(a.shape)}, got {_checks.describe(b)}")
    if isinstance(t, torch.Tensor):
        _checks.check_float_tensor("t", t)
        if t.device != a.device:
            raise ValueError(f"t: must be on the device of a ({a.device}), got {_checks.describe(t)}")
        extra = a.ndim - t.ndim
        if extra < 0 or any(n != 1 and n != m for n, m in zip(t.shape, a.shape[extra:], strict=True)):
            raise ValueError(f"t: must broadcast to the shape of a {tuple(a.shape)}, got {_checks.describe(t)}")
    else:
        t = _checks.check_number("t", t)
    no_cpp = f"its t must be a number, got {_checks.describe(t)}" if isinstance(t, torch.Tensor) else None
    no_triton = None
    if isinstance(t, torch.Tensor) and (a.ndim < 2 or ops.varies_inside_frames(t, a)):
        no_triton = f"its t must be a number or one value for each (dim 0, dim 2), got {_checks.describe(t)}"
    if limit is not None:
        limit = _checks.check_number("limit", limit)
        if limit <= 0:
            raise ValueError(f"limit: must be > 0, got {limit}")
        if isinstance(t, torch.Tensor):
            raise ValueError(f"limit: must be None with a tensor t, got {limit}")
    chosen = _choose("mp_sum", impl, a, no_cpp, no_triton)
    if chosen == "reference":
        return reference.mp_sum(a, b, t, limit)
    return ops.mp_sum_tensor(a, b, t, chosen) if isinstance(t, torch.Tensor) else ops.mp_sum(a, b, t, limit, chosen)


def mp_cat(a: torch.Tensor, b: torch.Tensor, dim: int = 1, t: float = 0.5, *, impl: str = "auto") -> torch.Tensor:
    """Magnitude-preserving concatenation (EDM2, eq. 103): t is the share of b in the result's magnitude.

    `torch.cat([c * (1 - t) / sqrt(Na) * a, c * t / sqrt(Nb) * b], dim)` with Na, Nb the sizes along `dim` and
    `c = sqrt((Na + Nb) / ((1 - t)**2 + t**2))`. Different dtypes are promoted; channels-last inputs give channels-last
    output.

    Raises:
        TypeError: not a tensor, or not a supported dtype.
        ValueError: shapes or devices do not match, a size along `dim` is 0, or `impl` cannot run here.
    """
    a, b = _check_pair(a, b)
    dim, t = _check_dim(dim, a), _checks.check_number("t", t)
    if a.ndim != b.ndim or any(n != m for d, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if d != dim):
        raise ValueError(f"b: must have the shape of a {tuple(a.shape)} except in dim {dim}, got {_checks.describe(b)}")
    n_a, n_b = a.shape[dim], b.shape[dim]
    for name, size in (("a", n_a), ("b", n_b)):
        if size < 1:
            raise ValueError(f"{name}: size along dim {dim} must be >= 1, got {size}")
    chosen = _choose("mp_cat", impl, a)
    if chosen == "reference":
        return reference.mp_cat(a, b, dim, t)
    c = ((n_a + n_b) / ((1 - t) ** 2 + t**2)) ** 0.5
    return ops.mp_cat(a, b, dim, c * (1 - t) / n_a**0.5, c * t / n_b**0.5, chosen)


def pixel_norm(x: torch.Tensor, dim: int = 1, eps: float = 1e-4, *, impl: str = "auto") -> torch.Tensor:
    """Scale to unit RMS along `dim`: `x / (eps + x.norm(dim=dim, keepdim=True) / sqrt(x.shape[dim]))`.

    The norm is taken in fp32 (fp64 for fp64). An all-zero vector stays zero, and its gradient is grad / eps.

    Raises:
        TypeError: x is not a tensor of a supported dtype.
        ValueError: `dim` does not exist or has size 0, `eps` is not positive, or `impl` cannot run here.
    """
    dim, eps = _check_norm(x, dim, eps)
    chosen = _choose("pixel_norm", impl, x)
    return reference.pixel_norm(x, dim, eps) if chosen == "reference" else ops.pixel_norm(x, dim, eps, chosen)[0]


def pixel_norm_silu(
    x: torch.Tensor, dim: int = 1, eps: float = 1e-4, *, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`n = pixel_norm(x, dim, eps)` and `mp_silu(n)`, the main path and the input of the residual, from one read of x.

    Raises:
        TypeError, ValueError: as `pixel_norm`.
    """
    dim, eps = _check_norm(x, dim, eps)
    chosen = _choose("pixel_norm_silu", impl, x)
    if chosen == "reference":
        return reference.pixel_norm_silu(x, dim, eps)
    normed, act, _ = ops.pixel_norm_silu(x, dim, eps, chosen)
    return normed, act


def _check_pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _checks.check_float_tensor("a", a)
    _checks.check_float_tensor("b", b)
    if a.device != b.device:
        raise ValueError(f"b: must be on the device of a ({a.device}), got {_checks.describe(b)}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _check_dim(dim: int, x: torch.Tensor) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: must be an integer in [{-x.ndim}, {x.ndim}), got {_checks.short(dim)}")
    return dim % x.ndim


def _check_norm(x: torch.Tensor, dim: int, eps: float) -> tuple[int, float]:
    _checks.check_float_tensor("x", x)
    dim, eps = _check_dim(dim, x), _checks.check_number("eps", eps)
    if eps <= 0:
        raise ValueError(f"eps: must be > 0, got {eps}")
    if x.shape[dim] < 1:
        raise ValueError(f"x: size along dim {dim} must be >= 1, got {_checks.describe(x)}")
    return dim, eps


def _choose(op: str, impl: str, x: torch.Tensor, no_cpp: str | None = None, no_triton: str | None = None) -> str:
    available, why_not = ops.implementations(x.device, x.dtype, no_cpp=no_cpp, no_triton=no_triton)
    return _checks.choose_implementation(op, impl, x.device, available, why_not)
