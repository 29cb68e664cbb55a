"""Old names that still work for one more minor version, each with a warning."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, TypeVar

import torch

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_PASSED_BY = ("sae_kernels", "sae_diffusion", "torch")


def warn_renamed(old: str, new: str) -> None:
    """DeprecationWarning at the line of the user's code that used `old`."""
    if torch.compiler.is_compiling():
        return
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_BY:
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{old}: is now called {new}", DeprecationWarning, stacklevel=level)


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Lets a function take keyword arguments under their old names too: old="new"."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            for old in names.keys() & keywords.keys():
                if names[old] in keywords:
                    raise TypeError(f"{old}: is the old name of {names[old]}, got both")
                warn_renamed(old, names[old])
                keywords[names[old]] = keywords.pop(old)
            return function(*arguments, **keywords)

        return call  # type: ignore[return-value]

    return decorate


def renamed_attributes(**names: str) -> Callable[[type[T]], type[T]]:
    """Lets the attributes of a class be read under their old names too: old="new"."""

    def alias(old: str, new: str) -> property:
        def read(self: Any) -> Any:
            warn_renamed(old, new)
            return getattr(self, new)

        return property(read, doc=f"Deprecated: `{new}`.")

    def decorate(cls: type[T]) -> type[T]:
        for old, new in names.items():
            setattr(cls, old, alias(old, new))
        return cls

    return decorate


def renamed_fields(**names: str) -> Callable[[type[T]], type[T]]:
    """Both of these for a class whose arguments are its attributes, such as a dataclass."""

    def decorate(cls: type[T]) -> type[T]:
        cls.__init__ = renamed_arguments(**names)(cls.__init__)  # type: ignore[method-assign]
        return renamed_attributes(**names)(cls)

    return decorate


def renamed_members(module: str, names: Mapping[str, Any]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose functions or classes have new names: {old: object}."""

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(name, names[name].__name__)
        return names[name]

    return __getattr__
