"""Seeded faults: an op whose composed route has one piece of its source replaced."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable

import pytest


@pytest.fixture
def seed_fault(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """seed_fault(ops, old, new, ...): pairs of texts; each old one must stand in the source of ops.composed."""

    def seed(ops: types.ModuleType, *texts: str) -> None:
        source = inspect.getsource(ops.composed)
        for old, new in zip(texts[::2], texts[1::2], strict=True):
            assert source.count(old) == 1, f"the seeded fault no longer matches the source: {old}"
            source = source.replace(old, new)
        module = types.ModuleType(f"{ops.__package__}.faulty")
        module.__package__ = ops.__package__
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(source, "faulty", "exec"), module.__dict__)
        monkeypatch.setattr(ops, "composed", module)

    return seed
