"""Rules for the values of a configuration, written in the types of its fields, and checked when it is made."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, Union

FP32_MAX = (2 - 2**-23) * 2.0**127
INT64_MAX = 2**63 - 1


class Rule(NamedTuple):
    """What a number must be, beside finite in fp32, or for an integer within int64."""

    text: str
    holds: Callable[[float], bool]


Natural = Annotated[int, Rule("at least 0", lambda value: value >= 0)]
Count = Annotated[int, Rule("at least 1", lambda value: value >= 1)]
AtLeastTwo = Annotated[int, Rule("at least 2", lambda value: value >= 2)]
Finite = Annotated[float, Rule("finite", lambda value: True)]
Positive = Annotated[float, Rule("positive", lambda value: value > 0)]
NotNegative = Annotated[float, Rule("at least 0", lambda value: value >= 0)]
Fraction = Annotated[float, Rule("in [0, 1]", lambda value: 0 <= value <= 1)]
BelowOne = Annotated[float, Rule("in [0, 1)", lambda value: 0 <= value < 1)]
InnerFraction = Annotated[float, Rule("in (0, 1)", lambda value: 0 < value < 1)]


class Checked:
    """A dataclass that checks its fields when it is made."""

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(config: Any) -> None:
    """Each field follows the `Rule` in its type, is one of a Literal's values, or None where it may be.

    Raises:
        ValueError: one does not; the message names field, rule and value.
    """
    for name, kind in _kinds(config.__class__).items():
        check_value(name, getattr(config, name), kind)


@cache
def _kinds(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config, include_extras=True)


def check_value(name: str, value: Any, kind: Any) -> None:
    """As `check_fields`, of a single value and its type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        for rule in parts[1:]:
            if isinstance(rule, Rule):
                _check_number(name, value, Integral if parts[0] is int else Real, rule)
    elif origin is Literal:
        check_choice(name, value, parts)
    elif origin in (Union, types.UnionType):
        if value is not None:
            check_value(name, value, parts[0])
    elif origin is tuple:
        if parts[-1] is not Ellipsis and len(value) != len(parts):
            raise ValueError(f"{name}: must be {len(parts)} numbers, got {value}")
        for item in value:
            check_value(name, item, parts[0])


def check_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raises ValueError where the value is none of those known."""
    if value not in known:
        raise ValueError(f"{name}: must be one of {', '.join(map(str, known))}, got {value!r}")


def _check_number(name: str, value: Any, kind: type, rule: Rule) -> None:
    is_kind = isinstance(value, kind) and not isinstance(value, bool)
    if not is_kind:
        raise ValueError(f"{name}: must be {'an integer' if kind is Integral else 'a number'}, got {_shown(value)}")
    # no conversion to float before: an integer may be too large for one
    if kind is Real and not -FP32_MAX <= value <= FP32_MAX:
        raise ValueError(f"{name}: must be finite in fp32, got {_shown(value)}")
    if not rule.holds(value):
        raise ValueError(f"{name}: must be {rule.text}, got {_shown(value)}")
    if kind is Integral and value > INT64_MAX:
        raise ValueError(f"{name}: must be at most {INT64_MAX}, got {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, Integral) and abs(int(value)) >= 10**20:
        return f"an integer of {int(math.log10(abs(int(value)))) + 1} digits"
    return repr(value)
