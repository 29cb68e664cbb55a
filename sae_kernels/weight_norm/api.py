"""Weight normalisation of EDM2: argument checks and choice of implementation.

All functions take float32, bfloat16, float16 and float64 on any device, compute in fp32 (fp64 for fp64) also under
autocast, and are deterministic. `impl` is "auto" or a name; a named one is used or refused, never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _checks
from . import ops, reference


def normalize_weight(w: torch.Tensor, gain: float | torch.Tensor = 1, *, impl: str = "auto") -> torch.Tensor:
    """The effective weight of a magnitude-preserving layer (EDM2, eqs. 47 and 66).

    `w / (1e-4 + rms) * gain / sqrt(fan_in)`, with the rms of each output channel `w[i]`, and fan_in its size.

    Args:
        w: (Cout, ...), at least two dimensions.
        gain: a number, or a tensor of one element, which receives a gradient too.

    Raises:
        TypeError: not a tensor, or not a supported dtype.
        ValueError: a wrong shape or device, or `impl` cannot run here.
    """
    _checks.check_float_tensor("w", w)
    if w.ndim < 2 or any(n < 1 for n in w.shape[1:]):
        raise ValueError(f"w: must have shape (Cout, ...) with a fan-in of at least 1, got {_checks.describe(w)}")
    if isinstance(gain, torch.Tensor):
        _checks.check_float_tensor("gain", gain)
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

    The gradients of all weights are computed in one pass too, once those of all results are known: under data
    parallelism, where communication should overlap with backward, use `normalize_weight` for each layer.

    Args:
        weights: each (Cout, ...), at least two dimensions, of one device.
        gains: numbers; None for 1.
        dtype: of the results, by default those of the weights; the autocast dtype saves a cast of each.
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
    whole list. If `copies` are given, each is filled with `normalize_weight(w, gain)` of the new w.

    Args:
        weights: each (Cout, ...), at least two dimensions, all on one device. A tensor that appears again, such as a
            tied weight, is normalised once; other tensors that share memory are refused.
        copies: contiguous tensors of the weights' shapes, one for each weight in the list; None for no copies.
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
        _checks.check_float_tensor("copies", copy)
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
        _checks.check_float_tensor("weights", w)
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


def _choose(op: str, impl: str, w: torch.Tensor) -> str:
    available, why_not = ops.implementations(w.device, w.dtype)
    return _checks.choose_implementation(op, impl, w.device, available, why_not)
