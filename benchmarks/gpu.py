"""What `make gpu` runs on a machine with a GPU, as found: check, build, tests, sanitizer, benchmarks, in a time budget.

Needs torch, triton and pytest; no network, no installation, nothing written outside the checkout and GPU_OUT. What it
finds out lands in one folder at once: a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ROOT

# Shares of the budget that no step may exceed; the benchmarks take what is left.
SHARES = {"build": 0.4, "tests": 0.4, "sanitizer": 0.2}
# Kept back for the tables, and for a benchmark that takes longer than judged.
RESERVE_S = 20.0


class Session:
    """Steps run so far, and the time they may still take."""

    def __init__(self, out: Path, budget: float, device: str, dry: bool) -> None:
        self.out, self.budget, self.device, self.dry = out, budget, device, dry
        self.started = time.perf_counter()
        self.steps: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {"device": device, "dry": dry, "budget_s": budget}

    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.started)

    def add(self, name: str, status: str, detail: str = "", seconds: float = 0.0) -> None:
        """status: "ok", "failed", "out of time" or "skipped"."""
        self.steps.append({"step": name, "status": status, "detail": detail, "seconds": round(seconds, 1)})
        print(f"[{name}] {status}{': ' + detail if detail else ''}", flush=True)
        self.write()

    def write(self) -> None:
        from .run import write_json

        write_json(self.out / "summary.json", self.facts | {"steps": self.steps})

    def command(
        self, name: str, command: Sequence[str], limit: float, *, fine: Sequence[int] = (0,), **env: str
    ) -> int:
        """Run a command, its output into <name>.log; stop it and its children after `limit` seconds."""
        begun = time.perf_counter()
        print(f"[{name}] {' '.join(command)}", flush=True)
        log = self.out / f"{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                list(command), cwd=ROOT, env=self._environment() | env, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code, status = process.wait(timeout=max(limit, 1.0)), None
            except subprocess.TimeoutExpired:
                _stop(process)
                code, status = -1, "out of time"
        print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-40:]), flush=True)
        status = status or ("ok" if code in fine else "failed")
        detail = {"ok": "", "failed": f"exit status {code}, see {log.name}"}.get(status, f"stopped after {limit:.0f} s")
        self.add(name, status, detail, time.perf_counter() - begun)
        return code

    def _environment(self) -> dict[str, str]:
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
        caches = ROOT / "build" / "cache"
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            env.setdefault(name, str(caches / name.split("_")[0].lower()))
        return env


def _stop(process: subprocess.Popen) -> None:
    """Terminate the process, which leads its own process group, with its children; kill them if they do not end."""
    for sent, patience in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sent)
            process.wait(timeout=patience)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def check_environment(session: Session) -> bool:
    """Print what is installed; False if a GPU is required and there is none."""
    from . import measure

    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        session.add("environment", "failed", str(error))
        return False
    if session.device == "cuda" and not torch.cuda.is_available():
        session.add("environment", "failed", "PyTorch sees no CUDA device")
        return False
    facts = measure.environment(session.device)
    facts["nvcc"] = shutil.which("nvcc") or "not found"
    facts["compute_sanitizer"] = shutil.which("compute-sanitizer") or "not found"
    packages = (
        "pytest",
        "pytest-xdist",
        "pytest-benchmark",
        "hypothesis",
        "numpy",
        "safetensors",
        "matplotlib",
        "rich",
    )
    facts["packages"] = {name: _version(name) for name in packages}
    session.facts |= facts
    if importlib.util.find_spec("pytest") is None:
        session.add("environment", "failed", "pytest is not installed")
        return False
    name = facts.get("gpu") or facts["cpu"]
    session.add("environment", "ok", f"{name}, torch {facts['torch']}, triton {facts['triton']}")
    from sae_kernels.__main__ import format_report, report

    (session.out / "report.txt").write_text(format_report(report()) + "\n")
    return True


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def build(session: Session) -> None:
    """C++ and CUDA sources for the present architecture, in place; without sources there is nothing to build."""
    sources = [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]
    if not sources:
        session.add("build", "skipped", "no sources in csrc")
        return
    if session.dry:
        session.add("build", "skipped", f"dry run; {len(sources)} sources in csrc")
        return
    limit = min(session.left(), SHARES["build"] * session.budget)
    session.command(
        "build", [sys.executable, "setup.py", "build_ext", "--inplace"], limit, SAE_CUDA_ARCHS=_architecture()
    )
    # The build leaves out what it cannot build, and says so there.
    record = ROOT / "sae_kernels" / "_build.json"
    reasons = json.loads(record.read_text()) if record.exists() else {}
    for library, reason in reasons.items():
        if reason:
            session.add(f"build-{library}", "failed", reason)


def _architecture() -> str:
    """Of the first GPU, as SAE_CUDA_ARCHS names it: 80, 90a, 120."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major == 9 else "")


def marked() -> list[str]:
    """Test files with a GPU test in them; others may need packages that are not here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "pytest.mark.gpu" in f.read_text()]


def tests(session: Session) -> None:
    files = marked()
    if not files:
        session.add("tests", "skipped", "no test carries the mark gpu")
        return
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        *files,
    ]
    # Most of the time goes into compiling kernels, on one core for each process.
    if importlib.util.find_spec("xdist") is not None and not session.dry:
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"]
    command += ["--collect-only"] if session.dry else [f"--junitxml={session.out / 'tests.xml'}"]
    session.command("tests", command, min(session.left(), SHARES["tests"] * session.budget))


def sanitizer(session: Session, asked: bool) -> None:
    """memcheck and racecheck over the GPU tests of the C++ ops, if there are such."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        session.add("sanitizer", "failed" if asked else "skipped", "compute-sanitizer is not on the PATH")
        return
    # those that ask whether the extension is there
    files = [name for name in marked() if "_extension" in (ROOT / name).read_text()]
    if session.dry or not files:
        session.add("sanitizer", "skipped", "dry run" if session.dry else "no tests of CUDA C++ ops")
        return
    tested = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    for tool in ("memcheck", "racecheck"):
        limit = min(session.left(), SHARES["sanitizer"] * session.budget / 2)
        # Reads beyond a tensor stay unseen while PyTorch's allocator serves them from one large block.
        session.command(
            f"sanitizer-{tool}",
            [found, f"--tool={tool}", "--error-exitcode=1", *tested],
            limit,
            fine=(0, 5),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )


def benchmarks(session: Session) -> None:
    from . import report

    result = session.out / "benchmarks.json"
    command = [sys.executable, "-m", "benchmarks", "--device", session.device, "--json", str(result), "--no-plots"]
    left = session.left() - RESERVE_S
    if session.dry:
        command += ["--dry", "--threads", "1"]
    elif left < 30:
        session.add("benchmarks", "out of time", f"{left:.0f} s left")
        return
    else:
        command += ["--budget", f"{left:.0f}", "--seconds", "2"]
    session.command("benchmarks", command, session.left() - RESERVE_S / 2)
    if result.exists():
        begun = time.perf_counter()
        try:
            (session.out / "tables.md").write_text(
                report.main([result], None, None, session.out, draw=not session.dry) + "\n"
            )
        except Exception as error:  # the figures are safe in the result file
            session.add("tables", "failed", f"{type(error).__name__}: {error}")
        else:
            session.add("tables", "ok", seconds=time.perf_counter() - begun)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if no step failed; a step that ran out of time has not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry", action="store_true", help="start every step, but do almost nothing in it")
    parser.add_argument("--sanitize", action="store_true", help="fail if compute-sanitizer is missing")
    parser.add_argument(
        "--budget", type=float, default=float(os.environ.get("GPU_BUDGET_S", 480)), help="seconds (GPU_BUDGET_S)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the results (GPU_OUT; default benchmarks/results/<date>-<gpu>)"
    )
    options = parser.parse_args(argv)
    out = options.out or (Path(os.environ["GPU_OUT"]) if os.environ.get("GPU_OUT") else _default_out(options.device))
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    session = Session(out, options.budget, options.device, options.dry)
    asked = options.sanitize or os.environ.get("GPU_SANITIZE", "") not in ("", "0")
    if check_environment(session):
        build(session)
        tests(session)
        sanitizer(session, asked)
        benchmarks(session)
    failed = [s["step"] for s in session.steps if s["status"] == "failed"]
    print(f"results in {out}; " + (f"failed: {', '.join(failed)}" if failed else "nothing failed"))
    return 1 if failed else 0


def _default_out(device: str) -> Path:
    name = device
    if device == "cuda":
        from .measure import machine_slug

        try:
            import torch

            name = machine_slug({"gpu": torch.cuda.get_device_name(0)})
        except Exception:  # the environment check says what is wrong
            name = "no-gpu"
    return ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{name}"


if __name__ == "__main__":
    sys.exit(main())
