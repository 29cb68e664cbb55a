"""`python -m benchmarks`: run cases; tables, JSON, plots. `python -m benchmarks report`: tables of docs and README.

`python -m benchmarks traffic`: launches and bytes of a training step, counted instead of timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import ROOT, measure, registry, report, run, traffic

# glibc returns blocks above 32 MiB to the system when they are freed, so that every call of a large case would pay for
# fresh pages: 64 MiB cost between 4 and 62 ms here, eight times what the kernel to be timed takes, for ours and for
# peers alike. With these the process keeps its memory, as a CUDA process does. glibc reads them when it starts.
WARM_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", choices=registry.OPS, action="append", help="only this op; can be given several times")
    parser.add_argument("--case", help="only the case with this name")
    parser.add_argument("--filter", default="", metavar="TEXT", help='only cases with TEXT in "op/case"')
    parser.add_argument("--quick", action="store_true", help="only the most important cases, half the time for each")
    parser.add_argument(
        "--dry", action="store_true", help="only check that it runs: tiny cases, one round, nothing compiled"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and exit")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument(
        "--seconds", type=float, help="seconds of timing for each case and direction (default 3, with --quick 1.5)"
    )
    parser.add_argument("--budget", type=float, help="seconds in total; the most important cases come first")
    parser.add_argument("--json", type=Path, help="result file (default benchmarks/results/<date>-<machine>.json)")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument(
        "--allocator", choices=("warm", "as-found"), default="warm", help="whether freed memory stays in the process"
    )
    return parser


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description="Tables and plots of result files."
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="file for all tables")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file for the short table")
    parser.add_argument("--print", action="store_true", help="print all tables and write no file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where plots go (default: beside each file)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if a case's gate is red; 2 for a wrong request."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["traffic"]:
            return traffic.main(argv[1:], ROOT)
        return _report(argv[1:]) if argv[:1] == ["report"] else _run(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _report(argv: Sequence[str]) -> int:
    options = _report_parser().parse_args(argv)
    pages = (None, None) if options.print else (options.page, options.readme)
    text = report.main(options.files, *pages, options.plots)
    print(text if options.print else f"wrote {options.page} and {options.readme}")
    return 0


def _run(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: CUDA is not available here")
    if options.list:
        _list(options)
        return 0
    cases = registry.select(
        device,
        ops=options.op or registry.OPS,
        case=options.case,
        contains=options.filter,
        quick=options.quick,
        dry=options.dry,
    )
    if not cases:
        raise ValueError(f"no case for {device} matches")
    seconds = options.seconds or (1.5 if options.quick else 3.0)
    with measure.threads(options.threads):
        path = options.json or _default_path(device)
        result = run.run_all(cases, device, run.Options(seconds, options.dry, options.budget), path, show=report.show)
    red = [f"{r['op']}/{r['case']}" for r in result["cases"] if not r["gate"]["ok"]]
    print(f"wrote {path} ({result['seconds']:.0f} s)")
    if not options.no_plots and not options.dry:
        drawn, reason = report.plots_or_reason(result, path.parent, path.stem)
        print(reason or "\n".join(f"wrote {p}" for p in drawn))
    if red:
        print(f"RED: {', '.join(red)}", file=sys.stderr)
    return 1 if red else 0


def _list(options: argparse.Namespace) -> None:
    for op in options.op or registry.OPS:
        for case in registry.module_of(op).CASES:
            if options.filter not in f"{op}/{case.name}":
                continue
            devices = [d for d in ("cpu", "cuda") if case.shape(d) is not None]
            flags = [name for name in ("quick", "dry") if getattr(case, name)]
            print(f"{op + '/' + case.name:<36} {', '.join(devices):<10} {' '.join(flags):<6} {case.about}")


def _default_path(device: str) -> Path:
    environment = measure.environment(device)
    name = f"{environment['date'][:10]}-{measure.machine_slug(environment)}.json"
    return ROOT / "benchmarks" / "results" / name


def _start_with_warm_allocator() -> None:
    """Start this process again with `WARM_ALLOCATOR`, unless it runs with it already or there is no glibc."""
    if platform.libc_ver()[0] != "glibc" or WARM_ALLOCATOR.items() <= os.environ.items():
        return
    if "as-found" in sys.argv or "--allocator=as-found" in sys.argv:
        return
    arguments = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
    os.execve(sys.executable, arguments, os.environ | WARM_ALLOCATOR)


if __name__ == "__main__":
    _start_with_warm_allocator()
    sys.exit(main())
