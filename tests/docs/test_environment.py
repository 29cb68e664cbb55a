"""docs/environment.md names every environment variable that is read or set, and no other."""

from __future__ import annotations

import re

from page_reader import ROOT

READ = re.compile(
    r"""environ(?:\.get|\.setdefault)?[\[(]\s*"(\w+)"|"(\w+)" (?:not )?in os\.environ|getenv\("(\w+)"\)"""
    r"""|"(MALLOC_\w+)":"""
)
MAKE = re.compile(r"^(?:export )?(\w+) \?=|^#.*\b(GPU_\w+) seconds|results in (GPU_\w+)", re.MULTILINE)


def names(pattern: re.Pattern, text: str) -> set[str]:
    return {name for groups in pattern.findall(text) for name in ([groups] if isinstance(groups, str) else groups)} - {
        ""
    }


def test_all_are_listed():
    found = names(MAKE, (ROOT / "Makefile").read_text(encoding="utf-8"))
    for folder in ("sae_kernels", "python", "csrc", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
                found |= names(READ, path.read_text(encoding="utf-8"))
    found |= names(READ, (ROOT / "setup.py").read_text(encoding="utf-8"))
    for path in (ROOT / "tests").rglob("*.py"):
        found |= {name for name in names(READ, path.read_text(encoding="utf-8")) if re.match("SAE_[A-Z]", name)}
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    listed = {
        name for row in re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert listed == found
