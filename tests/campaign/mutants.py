"""Apply each mutant of mutant_list.py in a copy of the tree and run its tests: one that no test notices is a survivor.

    python tests/campaign/mutants.py [--jobs N] [--only TEXT] [--new] [--trust]

Exit status 1 if a mutant survives, or if the tests fail without one. mutants.json keeps the test that noticed each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# What every test imports anyway, once; the Triton interpreter is chosen when Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# A bytecode file with the time and size of another source would hide a mutant.
sys.dont_write_bytecode = True
os.environ.update(PYTHONDONTWRITEBYTECODE="1")
import hypothesis  # noqa: E402, F401
import torch  # noqa: E402, F401
import triton  # noqa: E402, F401

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from mutant_list import DATA, DIFFUSION, ENTRIES, KERNELS, MODELS, TRAINING  # noqa: E402

AREAS = {"kernels": KERNELS, "model": MODELS, "diffusion": DIFFUSION, "training": TRAINING, "data": DATA}
RECORD = Path(__file__).with_name("mutants.json")
# A mutant that makes a test wait for ever is noticed, too.
LIMIT_S = 900


@dataclass(frozen=True)
class Mutant:
    file: str
    tests: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()}  ->  {self.new.strip()}"

    def problem(self, root: Path = ROOT) -> str | None:
        """Why it cannot be applied; None if it can."""
        path = root / self.file
        if not path.is_file():
            return "there is no such file"
        count = path.read_text(encoding="utf-8").count(self.old)
        if count != 1:
            return f"its text stands {count} times in the file, must be once"
        if self.new == self.old:
            return "it changes nothing"
        missing = [test for test in test_files(self.tests) if not (root / test).is_file()]
        return f"there is no {missing[0]}" if missing else None


def recorded() -> dict[str, str]:
    """The listed mutants that were noticed, and by which test."""
    noticed_by = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return {str(m): noticed_by[str(m)] for m in all_mutants() if str(m) in noticed_by}


def record(noticed_by: dict[str, str]) -> None:
    RECORD.write_text(json.dumps(noticed_by, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_files(tests: str) -> list[str]:
    return [word.partition("::")[0] for word in shlex.split(tests) if word.startswith("tests/")]


def all_mutants(entries=ENTRIES) -> list[Mutant]:
    return [Mutant(file, tests, old, new) for file, tests, pairs in entries for old, new in pairs]


def copy_tree(to: Path) -> Path:
    """What git tracks or would track, and the libraries that are built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    names = [name for name in listed.decode().split("\0") if name]
    names += [str(path.relative_to(ROOT)) for path in (ROOT / "sae_kernels").glob("*.so")]
    for name in [*names, "sae_kernels/_build.json"]:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def run_tests(tree: Path, tests: str) -> tuple[int, str]:
    """pytest's exit status and output, in a process that has torch already: a fork of this one."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            _become_pytest(tree, tests, output.fileno())
        deadline = time.monotonic() + LIMIT_S
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 1, f"FAILED no end after {LIMIT_S} s"
            time.sleep(0.05)
        output.seek(0)
        return os.waitstatus_to_exitcode(ended[1]), output.read().decode(errors="replace")


def _become_pytest(tree: Path, tests: str, output: int) -> None:
    status = 3
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        sys.path[:0] = [str(tree), str(tree / "python")]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # tests start workers
        sys.argv = ["pytest"]
        status = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", *shlex.split(tests)]))
        for name in ("sae_kernels", "sae_diffusion"):
            seen = getattr(sys.modules.get(name), "__file__", None) or str(tree)
            if not Path(seen).is_relative_to(tree):
                print(f"the tests saw {seen}, not the copy")
                status = 3
        sys.stdout.flush()
    finally:
        os._exit(status)


def build(tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, capture_output=True, text=True,
        check=False, env=os.environ | {"SAE_CPU_FLAGS": "-O1", "SAE_SKIP_CUDA": "1"},
    )  # fmt: skip
    if json.loads((tree / "sae_kernels" / "_build.json").read_text())["cpu"] is not None:
        raise RuntimeError(f"the C++ library is not built:\n{(done.stdout + done.stderr)[-2000:]}")


def noticed(mutant: Mutant, tree: Path) -> str | None:
    """The test that fails, or None for a survivor."""
    path = tree / mutant.file
    kept = path.read_bytes()
    compiled = mutant.file.startswith("csrc/")
    try:
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        if compiled:
            build(tree)
        code, output = run_tests(tree, mutant.tests)
    finally:
        path.write_bytes(kept)
        if compiled:
            for library in (ROOT / "sae_kernels").glob("_*.so"):
                shutil.copy2(library, tree / "sae_kernels")
    return None if code == 0 else failure(str(mutant), code, output)


def failure(what: str, code: int, output: str) -> str:
    if code not in (1, 2):
        raise RuntimeError(f"{what}: pytest ended with status {code}:\n{output[-3000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed[1] if failed else output.strip().splitlines()[-1]


def lane(chosen: Sequence[Mutant], tree: Path, trusted: bool, results: Any) -> None:
    """Try mutants one after the other in a tree of their own; before the first of each set of tests, that they pass."""
    passing = {mutant.tests for mutant in chosen if trusted}
    for mutant in chosen:
        try:
            if mutant.tests not in passing:
                code, output = run_tests(tree, mutant.tests)
                if code:
                    raise RuntimeError(f"{mutant.tests} fails without a mutant:\n{output[-3000:]}")
                passing.add(mutant.tests)
            results.put((mutant, noticed(mutant, tree), None))
        except Exception as error:
            results.put((mutant, None, f"{error}"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutants", description="Run the mutants of tests/campaign/mutant_list.py.")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tried at a time (default 1)")
    parser.add_argument("--only", default="", help="only mutants whose file or text contains this")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a mutant first")
    parser.add_argument("--new", action="store_true", help="only mutants that mutants.json does not have")
    options = parser.parse_args(argv)
    known = recorded()
    chosen = [m for m in all_mutants() if options.only in str(m) and not (options.new and str(m) in known)]
    broken = [f"{m}: {problem}" for m in chosen if (problem := m.problem())]
    if broken or not chosen:
        print(*broken or ["no mutants to try"], sep="\n")
        return 1 if broken else 0
    begun = time.monotonic()
    survivors, failures, tried = [], [], {}
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        # Neighbours in the list share their tests, so a lane takes whole groups.
        groups = list(dict.fromkeys(m.tests for m in chosen))
        for i in range(options.jobs):
            mine = [m for m in chosen if groups.index(m.tests) % options.jobs == i]
            tree = copy_tree(Path(folder, str(i)))
            context.Process(target=lane, args=(mine, tree, options.trust, results), daemon=True).start()
        for done in range(1, len(chosen) + 1):
            mutant, test, error = results.get()
            if error is not None:
                failures.append(error)
            elif test is None:
                survivors.append(mutant)
            tried[str(mutant)] = test
            outcome = "FAILED" if error else "SURVIVES" if test is None else f"noticed by {test}"
            print(f"{done}/{len(chosen)}  {mutant}  {outcome}", flush=True)
    print(f"{len(chosen)} mutants, {len(survivors)} survivors, {time.monotonic() - begun:.0f} s")
    print(*(f"survivor: {mutant}" for mutant in survivors), *dict.fromkeys(failures), sep="\n")
    record({name: test for name, test in (recorded() | tried).items() if test is not None})
    return 1 if survivors or failures else 0


if __name__ == "__main__":
    sys.exit(main())
