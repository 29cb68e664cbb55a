"""Argument checks shared by every op's api: each error names the argument, the rule and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLEMENTATIONS = ("auto", "reference", "composed", "cpp", "triton", "cuda")


def describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(name: str, value: object, *, shape: str, ndim: int | None = None) -> None:
    """`shape` is the legend shown to the caller, such as "(B, H, S, D)"; ndim is counted from it unless given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: must be a tensor of shape {shape}, got {describe(value)}")
    wanted = shape.count(",") + 1 if ndim is None else ndim
    if value.ndim != wanted:
        raise ValueError(f"{name}: must have shape {shape}, got {describe(value)}")


def check_float(name: str, value: torch.Tensor) -> None:
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: dtype must be float32, bfloat16, float16 or float64, got {describe(value)}")


def check_like(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Same dtype and device as another argument."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: must have the dtype of {other_name} ({other.dtype}), got {describe(value)}")
    if value.device != other.device:
        raise ValueError(f"{name}: must be on the device of {other_name} ({other.device}), got {describe(value)}")


def check_size(name: str, what: str, got: int, rule: str, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"{name}: {what} must be {rule} = {wanted}, got {got}")


def check_word(name: str, value: object) -> None:
    """A signed 64-bit integer: a seed, or an offset of the generator."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: must be an integer, got {describe(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: must be in [-2^63, 2^63), got {value}")


def choose_implementation(
    op: str, impl: str, device: torch.device, available: Sequence[str], why_not: dict[str, str] | None = None
) -> str:
    """Resolve "auto" to the first of `available` (fastest first); an explicit request is honoured or refused.

    `why_not` maps an implementation that cannot run here to its reason.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "auto":
        return available[0]
    if impl in available:
        return impl
    reason = (why_not or {}).get(impl, "not implemented for this op")
    raise ValueError(f"impl: {op} cannot run {impl!r} on {device}: {reason}")
