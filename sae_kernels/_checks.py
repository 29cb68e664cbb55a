"""Argument checks shared by every op's api: each error names the argument, the rule and what was given."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Iterable, Sequence

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLEMENTATIONS = ("auto", "reference", "composed", "cpp", "triton", "cuda")


def describe(value: object) -> str:
    """Any value, in one short line."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.is_nested:
            return f"nested {dtype} tensor"
        kind = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{kind}{dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    kind = type(value).__name__
    if isinstance(getattr(value, "shape", None), tuple) and value.shape:  # type: ignore[attr-defined]
        return f"{kind} of shape {value.shape}"  # type: ignore[attr-defined]
    return f"{kind} {short(value)}"


def short(value: object) -> str:
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_dense(name: str, value: torch.Tensor) -> None:
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{name}: must be a dense tensor, got {describe(value)}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: must be True or False, got {describe(value)}")


def check_integers(name: str, value: object) -> list[int]:
    """The integers of a tuple or list."""
    if not isinstance(value, (tuple, list)) or not all(is_integer(item) for item in value):
        raise TypeError(f"{name}: must be a tuple of integers, got {describe(value)}")
    return list(value)


def is_integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_list(name: str, values: object, what: str) -> list:
    if isinstance(values, (torch.Tensor, str)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: must be a list of {what}, got {describe(values)}")
    return list(values)


def check_number(name: str, value: object, *, finite: bool = True) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: must be a number, got {describe(value)}")
    # Comparisons, because torch.compile cannot trace math.isfinite, and float() fails for large integers.
    held = -sys.float_info.max <= value <= sys.float_info.max
    if not held and (finite or isinstance(value, int)):
        raise ValueError(f"{name}: must be finite{'' if finite else ' as a float'}, got {short(value)}")
    return float(value)


def check_tensor(name: str, value: object, *, shape: str, ndim: int | None = None) -> None:
    """`shape` is shown in the message, such as "(B, H, S, D)"; the rank follows from it unless `ndim` is given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: must be a tensor of shape {shape}, got {describe(value)}")
    check_dense(name, value)
    wanted = shape.count(",") + 1 if ndim is None else ndim
    if value.ndim != wanted:
        raise ValueError(f"{name}: must have shape {shape}, got {describe(value)}")


def check_float(name: str, value: torch.Tensor) -> None:
    check_dense(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: dtype must be float32, bfloat16, float16 or float64, got {describe(value)}")


def check_float_tensor(name: str, value: object) -> None:
    """A float tensor of any shape."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: must be a tensor, got {describe(value)}")
    check_float(name, value)


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
    if not is_integer(value):
        raise TypeError(f"{name}: must be an integer, got {describe(value)}")
    if not -(2**63) <= value < 2**63:  # type: ignore[operator]
        raise ValueError(f"{name}: must be in [-2^63, 2^63), got {short(value)}")


def choose_implementation(
    op: str, impl: str, device: torch.device, available: Sequence[str], why_not: dict[str, str] | None = None
) -> str:
    """Resolve "auto" to the first of `available` (fastest first); a named implementation is used or refused.

    `why_not` maps an implementation that cannot run here to its reason.
    """
    if not isinstance(impl, str) or impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: must be one of {', '.join(IMPLEMENTATIONS)}, got {short(impl)}")
    if impl == "auto":
        return available[0]
    if impl in available:
        return impl
    reason = (why_not or {}).get(impl, "not implemented for this op")
    raise ValueError(f"impl: {op} cannot run {impl!r} on {device}: {reason}")
