"""Options that were renamed: their old names and values still work, on the command line and in files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ARGUMENTS = {"--window-frames": "--in-flight"}
VALUES = {"objective": {"teacher": "teacher_forcing"}}


def current_value(option: str, value: Any, *, warn: bool = True) -> Any:
    """Today's name of an option's value; an old one is a DeprecationWarning, unless a file of ours holds it."""
    new = VALUES.get(option, {}).get(value) if isinstance(value, str) else None
    if new is None:
        return value
    if warn:
        _warn(f"{option} {value}", new)
    return new


def current_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line under today's names; old ones are DeprecationWarnings."""
    found: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        new = ARGUMENTS.get(name.replace("_", "-"))
        if new is not None:
            _warn(name, new)
            name = new
        if equals:
            value = current_value(name[2:], value)
        elif found:
            name = current_value(found[-1][2:], name)
        found.append(f"{name}{equals}{value}")
    return found


def _warn(old: str, new: str) -> None:
    from sae_kernels._deprecated import warn_renamed  # imports torch, which options alone must not wait for

    warn_renamed(old, new)
