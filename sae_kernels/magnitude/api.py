"""Magnitude-preserving functions of EDM2: argument checks and choice of implementation.

Each keeps a unit root mean square where its inputs have one. All of them take float32, bfloat16, float16 and float64 on
any device, compute in fp32 (fp64 for fp64) also under autocast, keep the memory order of their (first) input, and are
deterministic. `impl` is "auto", "reference", "composed", or "triton"; a named one is used or refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _checks
from . import ops, reference


def mp_silu(x: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Magnitude-preserving SiLU: `F.silu(x) / 0.596` (EDM2, eq. 81).

    Raises:
        TypeError: x is not a tensor of a supported dtype.
        ValueError: `impl` cannot run here.
    """
    _check_tensor("x", x)
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
    _check_tensor("x", x)
    _check_tensor("scale", scale)
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
        t: a number, or a float tensor broadcastable to a, such as (B, 1, F, 1, 1) for one value per frame of
            (B, C, F, Y, X); it receives a gradient too. "triton" takes a number, or one value for each (dim 0, dim 2).
        limit: clamp the sum to [-limit, limit], without gradient where it is reached; for t a number.

    Raises:
        TypeError: not a tensor, or not a supported dtype.
        ValueError: shapes or devices do not match, `limit` is not positive or t a tensor, or `impl` cannot run here.
    """
    a, b = _check_pair(a, b)
    if a.shape != b.shape:
        raise ValueError(f"b: must have the shape of a {tuple(a.shape)}, got {_checks.describe(b)}")
    if isinstance(t, torch.Tensor):
        _check_tensor("t", t)
        if t.device != a.device:
            raise ValueError(f"t: must be on the device of a ({a.device}), got {_checks.describe(t)}")
        extra = a.ndim - t.ndim
        if extra < 0 or any(n != 1 and n != m for n, m in zip(t.shape, a.shape[extra:], strict=True)):
            raise ValueError(f"t: must broadcast to the shape of a {tuple(a.shape)}, got {_checks.describe(t)}")
    else:
        t = _checks.check_number("t", t)
    no_triton = None
    if isinstance(t, torch.Tensor) and (a.ndim < 2 or ops.varies_inside_frames(t, a)):
        no_triton = f"its t is a number or one value for each (dim 0, dim 2), got {_checks.describe(t)}"
    if limit is not None:
        limit = _checks.check_number("limit", limit)
        if limit <= 0:
            raise ValueError(f"limit: must be > 0, got {limit}")
        if isinstance(t, torch.Tensor):
            raise ValueError(f"limit: must be None with a tensor t, got {limit}")
    chosen = _choose("mp_sum", impl, a, no_triton)
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
        raise ValueError(f"b: must have the shape of a {tuple(a.shape)} but for dim {dim}, got {_checks.describe(b)}")
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
    """`n = pixel_norm(x, dim, eps)` and `mp_silu(n)`, the main path and the input of the residual, of one read of x.

    Raises:
        TypeError, ValueError: as `pixel_norm`.
    """
    dim, eps = _check_norm(x, dim, eps)
    chosen = _choose("pixel_norm_silu", impl, x)
    if chosen == "reference":
        return reference.pixel_norm_silu(x, dim, eps)
    normed, act, _ = ops.pixel_norm_silu(x, dim, eps, chosen)
    return normed, act


def normalize_weight(w: torch.Tensor, gain: float | torch.Tensor = 1, *, impl: str = "auto") -> torch.Tensor:
    """The effective weight of a magnitude-preserving layer (EDM2, eqs. 47 and 66).

    `w / (1e-4 + rms) * gain / sqrt(fan_in)`, with rms that of each output channel `w[i]` and fan_in its size.

    Args:
        w: (Cout, ...), at least two dimensions.
        gain: a number, or a tensor of one element, which receives a gradient too.

    Raises:
        TypeError: not a tensor, or not a supported dtype.
        ValueError: a wrong shape or device, or `impl` cannot run here.
    """
    _check_tensor("w", w)
    if w.ndim < 2 or any(n < 1 for n in w.shape[1:]):
        raise ValueError(f"w: must have shape (Cout, ...) with a fan-in of at least 1, got {_checks.describe(w)}")
    if isinstance(gain, torch.Tensor):
        _check_tensor("gain", gain)
        if gain.numel() != 1 or gain.device != w.device:
            raise ValueError(f"gain: must be one element on the device of w ({w.device}), got {_checks.describe(gain)}")
        gain = gain.reshape(())
    else:
        gain = _checks.check_number("gain", gain)
    chosen = _choose("normalize_weight", impl, w)
    if chosen == "reference":
        return reference.normalize_weight(w, gain)
    tensor, factor = (gain, 1.0) if isinstance(gain, torch.Tensor) else (None, gain)
    return ops.normalize_weight(w, tensor, factor, chosen)[0]


def normalize_weights(
    weights: Sequence[torch.Tensor],
    gains: Sequence[float] | None = None,
    *,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> list[torch.Tensor]:
    """`[normalize_weight(w, gain) for w, gain in zip(weights, gains)]`, all weights of a model in one pass.

    The gradients of all weights are made in one pass too, once those of all results are there: under data parallelism,
    where communication shall overlap with backward, `normalize_weight` for each layer is better.

    Args:
        weights: each (Cout, ...), at least two dimensions, of one device.
        gains: numbers; None for 1.
        dtype: of the results, those of the weights by default; such as the autocast dtype, which saves a cast of each.
        impl: "auto", "reference", "composed", "cpp" (the C++ extension on the CPU) or "cuda" (on CUDA), these two
            for contiguous float32 weights.

    Returns:
        Contiguous tensors of the weights' shapes.

    Raises:
        TypeError: not a tensor, or not a supported dtype.
        ValueError: a shape or device breaks its rule, or `impl` cannot run here.
    """
    weights = _checks.check_list("weights", weights, "tensors")
    _check_weights(weights)
    if dtype is not None and dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(f"dtype: must be float32, bfloat16, float16 or float64, got {dtype}")
    gains = _gains(gains, weights, "weights")
    if not weights:
        return []
    chosen = _choose_for(weights, "normalize_weights", impl)
    if chosen == "reference":
        made = (reference.normalize_weight(w, gain, dtype) for w, gain in zip(weights, gains, strict=True))
        return [w.contiguous() for w in made]
    return ops.normalize_weights(weights, gains, dtype, chosen)


@torch.no_grad()
def normalize_weights_(
    weights: Sequence[torch.Tensor],
    *,
    copies: Sequence[torch.Tensor] | None = None,
    gains: Sequence[float] | None = None,
    impl: str = "auto",
) -> None:
    """Forced weight normalisation (EDM2, section 2.3) of all weights of a model, in place, without gradient.

    Every output channel becomes `w[i] / (1e-4 + rms(w[i]))`. The extension reads and writes each weight once for the
    whole list. Where `copies` are given, each is filled with `normalize_weight(w, gain)` of the new w.

    Args:
        weights: each (Cout, ...), at least two dimensions, of one device. A tensor given again, such as a tied weight,
            is normalised once; tensors that share memory otherwise are refused.
        copies: contiguous tensors of the weights' shapes; None for none. One for each weight, also for one given again.
        gains: of the copies; None for 1.
        impl: "auto", "composed", "cpp" (the C++ extension on the CPU) or "cuda" (on CUDA): contiguous float32 weights.

    Raises:
        TypeError: not a tensor, or not a supported dtype.
        ValueError: a shape or device breaks its rule, or `impl` cannot run here.
    """
    weights = _checks.check_list("weights", weights, "tensors")
    copies = [] if copies is None else _checks.check_list("copies", copies, "tensors")
    _check_weights(weights)
    for copy in copies:
        _check_tensor("copies", copy)
    if copies and [c.shape for c in copies] != [w.shape for w in weights]:
        raise ValueError(f"copies: must have the shapes of the weights, got {[tuple(c.shape) for c in copies]}")
    for copy in copies:
        if copy.device != weights[0].device:
            raise ValueError(f"copies: must be on the device of weights, got {_checks.describe(copy)}")
    if copies and not all(c.is_contiguous() for c in copies):
        raise ValueError("copies: must be contiguous, got strides that are not")
    gains = _gains(gains, copies, "copies")
    if weights:
        ops.normalize_weights_(weights, copies, gains, _choose_for(weights, "normalize_weights_", impl))


def _check_weights(weights: list[torch.Tensor]) -> None:
    for w in weights:
        _check_tensor("weights", w)
        if w.device != weights[0].device:
            raise ValueError(f"weights: must be on one device ({weights[0].device}), got {_checks.describe(w)}")
        if w.ndim < 2 or any(n < 1 for n in w.shape[1:]):
            raise ValueError(f"weights: must have shape (Cout, ...) with fan-in at least 1, got {_checks.describe(w)}")


def _gains(gains: Sequence[float] | None, tensors: list[torch.Tensor], name: str) -> list[float]:
    if gains is None:
        return [1.0] * len(tensors)
    found = [_checks.check_number("gains", gain) for gain in _checks.check_list("gains", gains, "numbers")]
    if len(found) != len(tensors):
        raise ValueError(f"gains: must be as many as {name} = {len(tensors)}, got {len(found)}")
    return found


def _choose_for(weights: list[torch.Tensor], op: str, impl: str) -> str:
    available, why_not = ops.weight_implementations(weights, in_place=op.endswith("_"))
    return _checks.choose_implementation(op, impl, weights[0].device, available, why_not)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: must be a tensor, got {_checks.describe(value)}")
    _checks.check_float(name, value)


def _check_pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_tensor("a", a)
    _check_tensor("b", b)
    if a.device != b.device:
        raise ValueError(f"b: must be on the device of a ({a.device}), got {_checks.describe(b)}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _check_dim(dim: int, x: torch.Tensor) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim: must be an integer in [{-x.ndim}, {x.ndim}), got {_checks.short(dim)}")
    return dim % x.ndim


def _check_norm(x: torch.Tensor, dim: int, eps: float) -> tuple[int, float]:
    _check_tensor("x", x)
    dim, eps = _check_dim(dim, x), _checks.check_number("eps", eps)
    if eps <= 0:
        raise ValueError(f"eps: must be > 0, got {eps}")
    if x.shape[dim] < 1:
        raise ValueError(f"x: size along dim {dim} must be >= 1, got {_checks.describe(x)}")
    return dim, eps


def _choose(op: str, impl: str, x: torch.Tensor, no_triton: str | None = None) -> str:
    available, why_not = ops.implementations(x.device, x.dtype, no_triton=no_triton)
    return _checks.choose_implementation(op, impl, x.device, available, why_not)
