"""Run cases: gate, then time, then write."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import measure
from .registry import Case, Contender, Problem, module_of

SCHEMA = 1


@dataclass(frozen=True)
class Options:
    """How long and how careful.

    Args:
        seconds: of timing for each case and direction.
        dry: one round, nothing compiled.
        budget: seconds for everything; no case is begun that would not end within it, judged by the longest so far.
    """

    seconds: float = 3.0
    dry: bool = False
    budget: float | None = None


def run_case(case: Case, device: str, options: Options, limits: Mapping[str, Any]) -> dict[str, Any]:
    """One case: the record that goes into the result file. `limits` are the machine's `measure.ceilings`."""
    shape = case.shape(device)
    started = time.perf_counter()
    torch.manual_seed(0)
    # Another case's compiled code would count towards the recompile limit, beyond which Dynamo silently runs eagerly.
    torch.compiler.reset()
    record = _blank(case, device)
    problem = module_of(case.op).build(shape, device)
    record |= {"dtype": problem.dtype, "unit": problem.unit, "flops": problem.flops, "bytes": problem.bytes}
    record["missing"] = [vars(m) for m in problem.missing]

    ready, red = _gate(problem, record, options)
    record["gate"] = {"ok": red is None, "reason": red}
    if red is None:
        _time(problem, ready, record, device, options, limits)
    record["seconds"] = time.perf_counter() - started
    return record


def _blank(case: Case, device: str) -> dict[str, Any]:
    record: dict[str, Any] = {"op": case.op, "case": case.name, "about": case.about, "device": device}
    return record | {"shape": dict(case.shape(device)), "results": [], "missing": [], "wrong": []}


def _gate(problem: Problem, record: dict[str, Any], options: Options) -> tuple[dict[str, list[Contender]], str | None]:
    """(contenders that may be timed, for each direction; the reason for which none may be, if one of ours is wrong)."""
    ready: dict[str, list[Contender]] = {}
    for contender in sorted(problem.contenders, key=lambda c: c.kind != "ours"):
        for direction in contender.launch:
            entry = {"contender": contender.name, "direction": direction}
            if contender.compiled and options.dry:
                record["missing"].append(entry | {"reason": "not compiled in a dry run"})
                continue
            try:
                if contender.kind != "other":
                    problem.check(contender, direction)
                else:
                    contender.launch[direction](problem.make_inputs(0))
            except AssertionError as error:
                if contender.kind == "ours":
                    return {}, f"{contender.name}, {direction}: {error}"
                record["wrong"].append(entry | {"reason": str(error)})
            except Exception as error:
                if contender.kind == "ours" and not contender.optional:
                    raise
                record["missing"].append(entry | {"reason": f"could not run: {_first_line(error)}"})
                if isinstance(error, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
            else:
                ready.setdefault(direction, []).append(contender)
    return ready, None


def _time(
    problem: Problem,
    ready: Mapping[str, list[Contender]],
    record: dict[str, Any],
    device: str,
    options: Options,
    limits: Mapping[str, Any],
) -> None:
    first = problem.make_inputs(0)
    size, cache = measure.nbytes(first), measure.cache_bytes(device)
    at_most = 1 if options.dry else problem.largest_sets
    count = measure.number_of_sets(size, cache, measure.free_bytes(device), at_most)
    sets = [first, *(problem.make_inputs(i) for i in range(1, count))]
    record["input_sets"] = count
    record["cold"] = device == "cuda" or measure.outgrow(size, count, cache)  # on a GPU the stopwatch empties the cache
    for direction, contenders in ready.items():
        calls = {c.name: [_bind(c, direction, inputs) for inputs in sets] for c in contenders}
        rounds = {"min_rounds": 1, "max_rounds": 1} if options.dry else {}
        times = measure.interleaved(calls, device, options.seconds, **rounds)
        for contender in contenders:
            peak, launches = measure.peak_memory(calls[contender.name][0], device)
            result: dict[str, Any] = {"contender": contender.name, "direction": direction}
            result |= {"kind": contender.kind, "note": contender.note} | measure.summary(times[contender.name])
            result |= {"units": contender.units, "setup": contender.setup, "peak_bytes": peak, "launches": launches}
            flops = (contender.flops or problem.flops).get(direction)
            moved = (contender.bytes or problem.bytes).get(direction)
            if flops:
                rate = flops / result["median_s"]
                best = limits["matmul_flops_per_s"].get(problem.dtype)
                result |= {"flops_per_s": rate, "fraction_of_matmul": rate / best if best else None}
            if moved:
                rate = moved / result["median_s"]
                result |= {"bytes_per_s": rate, "fraction_of_copy": rate / limits["copy_bytes_per_s"]}
            record["results"].append(result)
        if device == "cuda":
            record["clocks_after"] = measure.clocks()


def _bind(contender: Contender, direction: str, inputs: Any) -> Callable[[], Any]:
    given = inputs if contender.adapt is None else contender.adapt(inputs)
    return lambda: contender.launch[direction](given)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def run_all(
    cases: Sequence[Case],
    device: str,
    options: Options,
    write_to: Path | None,
    show: Callable[[dict[str, Any]], None] = lambda record: None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All cases; the file is whole after each of them. A case that fails is recorded, and the next one runs."""
    started = time.perf_counter()
    result: dict[str, Any] = {"schema": SCHEMA, "environment": measure.environment(device)}
    result["options"] = vars(options) | {"dry": options.dry}
    dtypes = ("fp32", "bf16") if device == "cpu" else ("bf16", "fp16", "fp32")
    result["ceilings"] = measure.ceilings(device, dtypes, small=options.dry)
    result |= {"cases": [], "not_run": [], "complete": False}
    longest = 0.0
    for case in cases:
        left = None if options.budget is None else options.budget - (time.perf_counter() - started)
        if left is not None and left < min(longest, 60.0):
            result["not_run"].append({"op": case.op, "case": case.name, "reason": f"{left:.0f} s of the budget left"})
            continue
        begun = time.perf_counter()
        try:
            record = run_case(case, device, options, result["ceilings"])
        except Exception as error:  # the others' figures are not to be lost
            record = _blank(case, device) | {"gate": {"ok": False, "reason": _first_line(error)}}
            say(f"{case.op}/{case.name}: {_first_line(error)}")
        if device == "cuda":
            torch.cuda.empty_cache()
        longest = max(longest, time.perf_counter() - begun)
        result["cases"].append(record)
        show(record)
        if write_to is not None:
            write_json(write_to, result)
    result["complete"] = not result["not_run"]
    result["environment"]["load_average_after"] = os.getloadavg()[0]
    result["seconds"] = time.perf_counter() - started
    if write_to is not None:
        write_json(write_to, result)
    return result


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader, or a kill, never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(beside, path)
