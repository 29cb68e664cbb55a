"""Every mutant of the list can be applied, and there are enough of them; `make mutants` runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import counts
import mutants


def test_every_mutant_applies():
    problems = [f"{m}: {problem}" for m in mutants.all_mutants() if (problem := m.problem())]
    assert not problems, "\n".join(problems)


def test_mutants_are_distinct_and_reach_every_area():
    listed = [(m.file, m.old, m.new) for m in mutants.all_mutants()]
    assert len(set(listed)) == len(listed) >= 60
    assert all(len(mutants.all_mutants(entries)) >= 5 for entries in mutants.AREAS.values())


@pytest.mark.parametrize(
    ("old", "new", "tests", "problem"),
    [
        ("absent", "x", "tests/conftest.py", "its text stands 0 times in the file, must be once"),
        ("import", "x", "tests/conftest.py", r"its text stands \d+ times in the file, must be once"),
        ("def poison", "def poison", "tests/conftest.py", "it changes nothing"),
        ("def poison", "def other", "tests/nowhere.py", "there is no tests/nowhere.py"),
    ],
)
def test_what_cannot_be_applied_is_named(old, new, tests, problem):
    assert re.fullmatch(problem, mutants.Mutant("tests/conftest.py", tests, old, new).problem())


def test_a_mutant_that_its_tests_notice_and_one_that_they_do_not(tmp_path):
    (tmp_path / "doubling.py").write_text("def twice(x):\n    return 2 * x  # 2\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_doubling.py").write_text(
        "from doubling import twice\n\n\ndef test_twice():\n    assert twice(3) == 6\n"
    )
    code = f"""
from pathlib import Path
from mutants import Mutant, noticed
for old, new in (("2 * x", "3 * x"), ("# 2", "# 3")):
    print(noticed(Mutant("doubling.py", "tests/test_doubling.py", old, new), Path({str(tmp_path)!r})))
"""
    # A process that has imported neither package: forks of it run the tests.
    printed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert printed.stdout.split() == ["tests/test_doubling.py::test_twice", "None"], printed.stderr
    assert (tmp_path / "doubling.py").read_text() == "def twice(x):\n    return 2 * x  # 2\n"


def test_the_page_claims_no_more_than_is_there():
    page = counts.PAGE.read_text(encoding="utf-8")
    noticed, listed = map(int, re.search(r"\| one-line faults noticed \| (\d+) of (\d+) listed", page).groups())
    assert 60 <= noticed <= len(mutants.recorded()) and listed <= len(mutants.all_mutants())
    (calls,) = re.findall(r"\| drawn calls of ops against fp64, at least \| ([\d,]+) \|", page)
    assert int(calls.replace(",", "")) <= counts.fuzz_calls()
    for name in re.findall(r"`(tests/[\w/.*]+)`", page):
        assert list(mutants.ROOT.glob(name)), name
