"""Timing, memory, the machine's own ceilings, and what the machine is."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ROOT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """Seconds of single calls: CUDA events on a GPU, the wall clock elsewhere.

    On a GPU each call follows a write of twice the L2 cache, which leaves it cold and lets the call's launches queue up
    behind it, so that gaps between launches count only where the host is slower than the device.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._evict = (
            torch.empty(2 * cache_bytes("cuda"), dtype=torch.int8, device="cuda") if device == "cuda" else None
        )
        self._events: list[tuple[list[float], Any, Any]] = []

    def time(self, call: Callable[[], Any], into: list[float]) -> None:
        """Run `call` and append its time to `into`, on a GPU not before `flush`."""
        if self._evict is None:
            start = time.perf_counter()
            call()
            into.append(time.perf_counter() - start)
            return
        self._evict.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        self._events.append((into, begin, end))

    def flush(self) -> None:
        if self._events:
            torch.cuda.synchronize()
            for into, begin, end in self._events:
                into.append(begin.elapsed_time(end) * 1e-3)
            self._events.clear()


def interleaved(
    calls: Mapping[str, Sequence[Callable[[], Any]]],
    device: str,
    seconds: float,
    *,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, list[float]]:
    """Times of all contenders, taken in turn: one call of each in a round, each round from another one on.

    Drift of clocks, temperature and neighbours thus falls on all alike. `calls` holds for each contender the same call
    on different input sets; successive rounds take successive sets. Rounds go on for `seconds`, at least `min_rounds`
    (three where one round takes longer than `seconds`).
    """
    watch, names = Stopwatch(device), list(calls)
    warm: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(3):
        for name in names:
            watch.time(calls[name][repeat % len(calls[name])], warm[name])
        watch.flush()
        if sum(times[-1] for times in warm.values()) > seconds / 5:
            break
    one_round = sum(times[-1] for times in warm.values())
    if one_round > seconds:
        min_rounds = min(min_rounds, 3)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - start + one_round < seconds):
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                watch.time(calls[name][rounds % len(calls[name])], times[name])
            watch.flush()
            rounds += 1
    finally:
        gc.enable()
    return times


def summary(times: Sequence[float]) -> dict[str, float | int]:
    """Median and quartiles in seconds, and the number of rounds."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {"median_s": median, "q25_s": low, "q75_s": high, "rounds": len(times)}


def peak_memory(call: Callable[[], Any], device: str) -> tuple[int, int | None]:
    """(bytes allocated at the peak of one call beyond what was there before; launches in it, None if unknown).

    On a GPU from PyTorch's allocator and the profiler's kernels; on the CPU from the profiler's allocation events, and
    a launch is a PyTorch operation that calls no other. Scratch memory that a library takes from elsewhere is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, _kernels(call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    events = _trace(profile)
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak, _leaves(events)


def _kernels(call: Callable[[], Any]) -> int | None:
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        events = _trace(profile)
    except RuntimeError:  # no right to use CUPTI, as in some containers
        return None
    return sum(e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for e in events) or None


def _trace(profile: torch.profiler.profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text(errors="replace"))["traceEvents"]


# Operations that touch no data.
_FREE = {f"aten::{name}" for name in ("empty", "empty_strided", "empty_like", "as_strided", "view", "detach", "alias")}


def _leaves(events: Sequence[dict[str, Any]]) -> int:
    """Operations on data that contain no other such operation, of each thread."""
    spans = sorted(
        (
            (e["tid"], e["ts"], e["ts"] + e["dur"])
            for e in events
            if e.get("cat") == "cpu_op" and e["name"] not in _FREE
        ),
        key=lambda s: (s[0], s[1], -s[2]),
    )
    following = [*spans[1:], None]
    return sum(after is None or after[0] != span[0] or after[1] >= span[2] for span, after in zip(spans, following))


def ceilings(device: str, dtypes: Sequence[str], *, small: bool = False) -> dict[str, Any]:
    """What this machine does at best: FLOP/s of a square matmul in each dtype, bytes/s (read plus written) of a copy.

    The best of some calls on random data, as a ceiling is; `small` shrinks both for dry runs.
    """
    n = 256 if small else 8192 if device == "cuda" else 2048
    found: dict[str, Any] = {"matmul_size": n, "matmul_flops_per_s": {}}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
        times = interleaved({"matmul": [lambda a=a, b=b: a @ b]}, device, 1.0, max_rounds=30)["matmul"]
        found["matmul_flops_per_s"][dtype] = 2 * n**3 / min(times)
    size = 1 << (20 if small else 30 if device == "cuda" else 28)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": [lambda: target.copy_(source)]}, device, 1.0, max_rounds=30)["copy"]
    return found | {"copy_size": size, "copy_bytes_per_s": 2 * size / min(times)}


def cache_bytes(device: str, caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The last-level cache: 50 MB of L2 is the most on a Hopper GPU; L3 as Linux tells it in `caches`, else 32 MB."""
    if device == "cuda":
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 50 << 20
    sizes = []
    for path in caches.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) << (10 if match[2] == "K" else 20))
    return max(sizes, default=32 << 20)


def free_bytes(device: str) -> int:
    """Free memory; half of all where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else os.sysconf("SC_PHYS_PAGES") // 2
    return pages * os.sysconf("SC_PAGE_SIZE")


def number_of_sets(bytes_of_one: int, cache: int, free: int, at_most: int) -> int:
    """Input sets to rotate over so that none is in the cache when its turn comes, within a quarter of free memory.

    Where the two disagree, as with 480 MiB of cache and little memory, memory wins: `outgrow` then tells.
    """
    wanted = 1 + -(-4 * cache // max(bytes_of_one, 1))
    affordable = free // 4 // max(bytes_of_one, 1)
    return max(1, min(max(2, wanted), affordable, at_most))


def outgrow(bytes_of_one: int, sets: int, cache: int) -> bool:
    """Whether the other sets fill the cache before a set's turn comes again."""
    return bytes_of_one * (sets - 1) >= cache


def nbytes(value: Any) -> int:
    """Bytes of all tensors in a nest of tuples, lists, dicts and dataclasses."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(nbytes, value.values()))
    if isinstance(value, (tuple, list)):
        return sum(map(nbytes, value))
    return sum(map(nbytes, vars(value).values())) if hasattr(value, "__dict__") else 0


def environment(device: str) -> dict[str, Any]:
    """Machine, versions and commit, for the head of a result file."""
    import triton  # the only place that wants its version

    commit, dirty = _git()
    found: dict[str, Any] = {
        "commit": commit,
        "uncommitted_changes": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "allocator": "memory is kept between calls" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "as found",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "clocks": clocks(),
        }
    return found


def clocks() -> dict[str, str] | None:
    """Driver, clocks, power and temperature as nvidia-smi reads them now; None without it."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    try:
        out = subprocess.run(
            ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in out.strip().split(","))))


def machine_slug(environment: Mapping[str, Any]) -> str:
    name = environment.get("gpu") or f"{environment['cpu']} {environment['cpu_count']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def _git() -> tuple[str, bool | None]:
    def run(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        return run("rev-parse", "HEAD"), bool(run("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "unknown", None


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
