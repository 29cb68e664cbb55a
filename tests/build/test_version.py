"""One version: written in sae_kernels/__init__.py, and whatever repeats it is held to it."""

from __future__ import annotations

import re
from pathlib import Path

import sae_kernels

ROOT = Path(__file__).parents[2]


def test_pyproject_takes_the_version_from_the_package():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text and not re.search(r"^version *= *\"", text, re.MULTILINE)


def test_citation_and_changes_name_the_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [sae_kernels.__version__]
    newest = re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == sae_kernels.__version__
