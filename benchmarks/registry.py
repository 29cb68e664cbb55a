"""What is measured: named cases, and for each the contenders that run it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

# In the order in which a run with a time budget takes them, at equal priority.
OPS = ("attention", "convolution", "train-step", "noise", "magnitude", "qk-prepare", "sampling", "scaling")


@dataclass(frozen=True)
class Case:
    """One problem size.

    Args:
        op: one of `OPS`, and the file that builds it.
        name: unique within the op; a shape's source, such as "wan-480p".
        about: where the shape comes from, one line.
        cuda, cpu: the size on either device, as the op's `build` takes it; None where it does not run.
        priority, cpu_priority: smaller ones first where time is short; the latter on the CPU, where it differs.
        quick: also part of `--quick`.
        dry: runs in a dry run; its CPU size takes milliseconds, and it is not listed otherwise.
    """

    op: str
    name: str
    about: str
    cuda: Mapping[str, Any] | None = None
    cpu: Mapping[str, Any] | None = None
    priority: int = 50
    quick: bool = False
    dry: bool = False
    cpu_priority: int | None = None

    def shape(self, device: str) -> Mapping[str, Any] | None:
        return self.cuda if device == "cuda" else self.cpu

    def order(self, device: str) -> int:
        return self.cpu_priority if device == "cpu" and self.cpu_priority is not None else self.priority


@dataclass
class Contender:
    """One way to do a case's work.

    Args:
        name: as shown.
        launch: for each direction, one call on one input set; returns what `Problem.check` looks at.
        kind: "ours" (held to the error budget), "peer" (held to half the digits of its dtype), or "other": a yardstick
            that computes something else, never checked; `note` says what.
        units: how many units of the problem one call yields.
        flops, bytes: of one call, where they are not the problem's.
        setup: what was paid before the first call: {"mask_seconds": ..., "mask_bytes": ...}.
        adapt: input set -> the input set for this contender, made once and not timed.
        compiled: takes seconds to compile; left out of dry runs.
        optional: one of ours that may be unable to run this size; not the default.
    """

    name: str
    launch: dict[str, Callable[[Any], Any]]
    kind: str = "peer"
    note: str = ""
    units: float = 1.0
    flops: dict[str, int] | None = None
    bytes: dict[str, int] | None = None
    setup: dict[str, float] = field(default_factory=dict)
    adapt: Callable[[Any], Any] | None = None
    compiled: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Missing:
    """A contender that is not there, and why; direction None means all."""

    contender: str
    reason: str
    direction: str | None = None


@dataclass
class Problem:
    """A case built on a device.

    Args:
        make_inputs: i -> a fresh input set of random data; different for each i.
        contenders: ours first.
        check: (contender, direction) -> None, or AssertionError with the reason.
        dtype: of the arithmetic, for the choice of the ceiling.
        flops, bytes: exact arithmetic and minimal device-memory traffic of one call, for each direction; may lack any.
        missing: contenders that are named but not there.
        unit: what `Contender.units` counts.
        largest_sets: upper bound on input sets, where one is large or all contenders share state.
    """

    make_inputs: Callable[[int], Any]
    contenders: list[Contender]
    check: Callable[[Contender, str], None]
    dtype: str
    flops: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    unit: str = "call"
    largest_sets: int = 64


def module_of(op: str) -> ModuleType:
    """The file of an op: `CASES` and `build(shape, device) -> Problem`."""
    return importlib.import_module(f".{op.replace('-', '_')}", __package__)


def select(
    device: str,
    *,
    ops: Iterable[str] = OPS,
    case: str | None = None,
    contains: str = "",
    quick: bool = False,
    dry: bool = False,
) -> list[Case]:
    """The cases that run on `device` ("cpu" or "cuda"), most important first.

    Args:
        case: a case's name; None for all.
        contains: part of "op/name".
        quick: only cases marked quick.
        dry: only cases marked dry; without it they are left out.

    Raises:
        ValueError: an unknown op, or no case of that name.
    """
    ops = list(ops)
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise ValueError(f"op: must be one of {', '.join(OPS)}, got {unknown[0]!r}")
    cases = [c for op in OPS if op in ops for c in module_of(op).CASES]
    if case is not None:
        named = [c for c in cases if c.name == case]
        if not named:
            raise ValueError(f"case: must be one of {', '.join(sorted({c.name for c in cases}))}, got {case!r}")
        here = [c for c in named if c.shape(device) is not None]
        if not here:
            raise ValueError(f"case: {case!r} has no size for {device}")
        return here
    found = [
        c
        for c in cases
        if c.shape(device) is not None and c.dry == dry and (c.quick or not quick) and contains in f"{c.op}/{c.name}"
    ]
    return sorted(found, key=lambda c: c.order(device))
