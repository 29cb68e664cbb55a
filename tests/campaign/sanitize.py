"""Build the C++ of the CPU library with GCC's sanitizers and call every op of it under them.

    python tests/campaign/sanitize.py [address] [thread]

`address` is AddressSanitizer and UndefinedBehaviorSanitizer, `thread` ThreadSanitizer with threads.cpp in the place of
torch's OpenMP. First the faults of planted.cpp must be found. Exit status 0 if nothing else was, 1 if something was, 2
if the sanitizer is not here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = os.environ.get("CXX") or "c++"
FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
LIBRARIES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
# torch keeps memory until the process ends; what it and Python do is not looked at.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
}
# name: (sanitizer, the call, what the report says)
PLANTED = {
    "a read beyond the end": ("address", "read_beyond(values, 4)", "heap-buffer-overflow"),
    "a signed overflow": ("address", "overflow(2**31 - 1)", "signed integer overflow"),
    "a shift too far": ("address", "shift_too_far(40)", "shift exponent 40 is too large"),
    "a data race": ("thread", "race(values)", "data race"),
}


def find(library: str) -> str | None:
    """Where the compiler has a library."""
    done = subprocess.run([COMPILER, f"-print-file-name={library}"], capture_output=True, text=True, check=False)
    path = Path(done.stdout.strip())
    return str(path.resolve()) if path.is_absolute() and path.exists() else None


def why_not(sanitizer: str) -> str | None:
    """Why it cannot run here; None if it can."""
    if platform.system() != "Linux":
        return f"it is preloaded as on Linux, this is {platform.system()}"
    if shutil.which(COMPILER) is None:
        return f"there is no C++ compiler ({COMPILER})"
    for library in LIBRARIES[sanitizer]:
        if find(library) is None:
            return f"{COMPILER} has no {library}"
    done = subprocess.run(
        [sys.executable, "-c", "pass"], env=environment(sanitizer), capture_output=True, text=True, check=False
    )
    return f"Python does not start under it: {done.stderr.strip()[:300]}" if done.returncode else None


def environment(sanitizer: str, *preload: Path) -> dict[str, str]:
    libraries = [find(library) for library in [*LIBRARIES[sanitizer], "libstdc++.so.6"]]
    preloaded = ":".join([*(name for name in libraries if name), *map(str, preload)])
    return os.environ | OPTIONS | {"LD_PRELOAD": preloaded, "OMP_NUM_THREADS": "1"}


def compile_library(source: str, to: Path, sanitizer: str) -> Path:
    flags = ["-std=c++20", "-fPIC", "-shared", *FLAGS, *SANITIZERS[sanitizer]]
    subprocess.run([COMPILER, *flags, str(HERE / source), "-o", str(to)], check=True)
    return to


def python(code_or_file: Sequence[str], env: dict[str, str], cwd: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *code_or_file], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def find_planted(sanitizer: str, scratch: Path, preload: Path) -> list[str]:
    """The planted faults that it does not find."""
    library = compile_library("planted.cpp", scratch / "planted.so", sanitizer)
    missed = []
    for name, (by, call, report) in PLANTED.items():
        if by != sanitizer:
            continue
        code = (
            "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.malloc.restype = ctypes.c_void_p\n"
            f"values = ctypes.c_void_p(libc.malloc(16))\nctypes.CDLL({str(library)!r}).{call}"
        )
        status, output = python(["-c", code], environment(sanitizer, preload), scratch)
        if status == 0 or report not in output:
            missed.append(f"{name}: status {status}, {output[-1000:]}")
    return missed


def build_copy(scratch: Path, sanitizer: str) -> Path:
    """A copy of sae_kernels whose CPU library is built with the sanitizer."""
    site = scratch / "site"
    shutil.copytree(ROOT / "sae_kernels", site / "sae_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    flags = " ".join([*FLAGS, *SANITIZERS[sanitizer]])
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={site}"], cwd=ROOT, text=True, check=False,
        env=os.environ | {"SAE_CPU_FLAGS": flags, "SAE_SKIP_CUDA": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if not (site / "sae_kernels" / "_cpu.so").exists():
        raise RuntimeError(f"the library is not built with {flags}:\n{done.stdout[-3000:]}")
    return site


def sanitize(sanitizer: str) -> str | None:
    """What the sanitizer reports of the ops, None if nothing.

    Raises:
        RuntimeError: a planted fault is not found, or the library is not built.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        threads = compile_library("threads.cpp", scratch / "threads.so", sanitizer)
        missed = find_planted(sanitizer, scratch, threads)
        if missed:
            raise RuntimeError(f"the {sanitizer} sanitizer does not find {missed[0]}")
        site = build_copy(scratch, sanitizer)
        status, output = python(
            [str(HERE / "exercise.py")], environment(sanitizer, threads) | {"PYTHONPATH": str(site)}, scratch
        )
        return output if status else None


def main(asked: Sequence[str]) -> int:
    worst = 0
    for sanitizer in asked or SANITIZERS:
        reason, begun = why_not(sanitizer), time.monotonic()
        if reason is not None:
            print(f"{sanitizer}: not run, {reason}")
            worst = max(worst, 2)
            continue
        report = sanitize(sanitizer)
        if report is not None:
            print(report)
            worst = 1
        print(
            f"{sanitizer}: {'nothing found' if report is None else 'FAILED'}, {time.monotonic() - begun:.0f} s",
            flush=True,
        )
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
