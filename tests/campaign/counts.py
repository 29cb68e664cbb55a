"""Write the counts in docs/reliability.md from what is listed and recorded: python tests/campaign/counts.py"""

from __future__ import annotations

import ast
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from mutant_list import DATA, DIFFUSION, KERNELS, MODELS, TRAINING  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"
FUZZ = ROOT / "tests" / "kernels" / "test_fuzz.py"
BEGIN, END = "<!-- counts: python tests/campaign/counts.py -->", "<!-- end of counts -->"
AREAS = {"kernels": KERNELS, "model": MODELS, "diffusion": DIFFUSION, "training": TRAINING, "data": DATA}


def mutants() -> dict[str, tuple[int, int]]:
    """(listed, noticed) of each area."""
    noticed = json.loads((HERE / "mutants.json").read_text(encoding="utf-8"))
    found = {}
    for area, entries in AREAS.items():
        names = [f"{f}: {old.strip()}  ->  {new.strip()}" for f, _, pairs in entries for old, new in pairs]
        found[area] = len(names), sum(name in noticed for name in names)
    return found


def fuzz_calls() -> int:
    """Calls that the fuzz makes at least: two of each draw."""
    if not FUZZ.exists():
        return 0
    (draws,) = (
        node.value
        for node in ast.parse(FUZZ.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DRAWS"
    )
    return 2 * sum(ast.literal_eval(draws).values())


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def table(tests: int, native: str, date: str) -> str:
    """The rows; the first two numbers are those of a run, the others follow from files."""
    of_area = mutants()
    listed, noticed = (sum(counts[i] for counts in of_area.values()) for i in (0, 1))
    areas = ", ".join(f"{area} {counts[0]}" for area, counts in of_area.items())
    left = f"; {listed - noticed} not tried since they were written" if listed > noticed else ""
    rows = [
        ("tests collected", f"{tests:,} on {date}"),
        ("calls of C++ ops under each sanitizer", native),
        ("one-line faults noticed", f"{noticed} of {listed} listed ({areas}){left}"),
    ]
    if fuzz_calls():
        rows.append(("drawn calls of ops against fp64, at least", f"{fuzz_calls():,}"))
    return "\n".join(["| what | count |", "|---|---|", *(f"| {what} | {count} |" for what, count in rows)])


def page_with(text: str, rows: str) -> str:
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{rows}\n\n{END}{tail}"


def main() -> None:
    collected = run("-m", "pytest", "--collect-only", "-q")
    native = re.match(r"(\d+) calls of (\d+) ops", run(str(HERE / "exercise.py")))
    tests = re.match(r"(\d+)", collected)
    assert native and tests, collected
    rows = table(int(tests[1]), f"{native[1]} of {native[2]} ops", datetime.date.today().isoformat())
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(rows)


if __name__ == "__main__":
    main()
