"""Checks of the numbers in a configuration; each raises a ValueError that names the field, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

FP32_MAX = (2 - 2**-23) * 2.0**127
_RULES: dict[str, Callable[[float], bool]] = {
    "finite": lambda value: True,
    "positive": lambda value: value > 0,
    "at least 0": lambda value: value >= 0,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1)": lambda value: 0 < value < 1,
}


def check_integers(config: Any, least: int, *names: str, most: int = 2**63 - 1) -> None:
    """Check that each of these fields is an integer in [least, most]."""
    for name in names:
        value = getattr(config, name)
        if not _is(value, Integral):
            raise ValueError(f"{name}: must be an integer, got {_shown(value)}")
        if value < least:
            raise ValueError(f"{name}: must be at least {least}, got {_shown(value)}")
        if value > most:
            raise ValueError(f"{name}: must be at most {most}, got {_shown(value)}")


def check_numbers(config: Any, rule: str, *names: str) -> None:
    """Check that each of these fields is a number that is finite in fp32 and follows the rule."""
    for name in names:
        check_number(name, getattr(config, name), rule)


def check_number(name: str, value: Any, rule: str) -> None:
    if not _is(value, Real):
        raise ValueError(f"{name}: must be a number, got {_shown(value)}")
    # before any conversion to float, for which an integer may be too large
    if not -FP32_MAX <= value <= FP32_MAX:
        raise ValueError(f"{name}: must be finite in fp32, got {_shown(value)}")
    if not _RULES[rule](float(value)):
        raise ValueError(f"{name}: must be {rule}, got {_shown(value)}")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if _is(value, Integral) and abs(int(value)) >= 10**20:
        return f"an integer of {int(math.log10(abs(int(value)))) + 1} digits"
    return repr(value)
