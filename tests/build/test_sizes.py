"""Files and functions stay of a size that can be read in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_LINES, MOST_PARAMETERS = 600, 12
SOURCES = [
    path
    for folder in ("sae_kernels", "python/sae_diffusion", "csrc", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh")
]

# What is still larger, to be taken from here as it becomes smaller; nothing is to be added.
LARGE_FILES: set[str] = set()
LARGE_FUNCTIONS = {
    "sae_kernels/qk_prepare/api.py": {"qk_prepare"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of parameters of each function that is no Triton kernel or helper of one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
            a = node.args
            named = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            own = named[1:] if named[:1] in (["self"], ["cls"]) else named
            yield node.name, len(own) + sum(p is not None for p in (a.vararg, a.kwarg))


def test_no_file_is_long():
    long = {name_of(path) for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES}
    assert long <= LARGE_FILES, f"must have at most {MOST_LINES} lines"


def test_no_function_takes_many_parameters():
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        if path.suffix == ".py":
            many = {name for name, count in functions(path) if count > MOST_PARAMETERS}
            found |= {name_of(path): many} if many else {}
    new = {name: many - LARGE_FUNCTIONS.get(name, set()) for name, many in found.items()}
    assert not any(new.values()), f"must take at most {MOST_PARAMETERS}: {new}"


def test_counting(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("@triton.jit(x=1)\ndef kernel(a): ...\nclass A:\n    def f(self, a, /, b, *c, d=1, **e): ...\n")
    assert list(functions(path)) == [("f", 5)]
