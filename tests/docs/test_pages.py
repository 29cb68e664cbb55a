"""README and docs/: every snippet runs, every command parses, every link leads somewhere. Without a network."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
from pathlib import Path

import page_reader
import pytest
import sae_diffusion
import torch
from page_reader import PAGES, ROOT, name_of
from sae_diffusion import cli
from torch._subclasses import FakeTensorMode

import sae_kernels

# On such a page tensors have shapes and no content: its sizes are those of the models it speaks of.
SHAPES_ONLY = "<!-- snippets: shapes only -->"


def having(what) -> list:
    found = [page for page in PAGES if any(True for _ in what(page.read_text(encoding="utf-8")))]
    return [pytest.param(page, id=name_of(page)) for page in found]


@pytest.mark.parametrize("page", having(page_reader.snippets))
def test_snippets_run(page, tmp_path, monkeypatch):
    """A page's blocks in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict = {"__name__": "__main__"}
    with FakeTensorMode() if SHAPES_ONLY in text else contextlib.nullcontext():
        for snippet in page_reader.snippets(text):
            where = "\n" * (snippet.line - 1)  # so that a traceback names the page's line
            exec(compile(where + snippet.text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", having(page_reader.commands))
def test_commands_parse(page, capsys):
    for line, command in page_reader.commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if not words:
            continue
        where = f"{name_of(page)}, block at line {line}: {command}"
        if words[:2] == ["torchrun", "--nproc-per-node"]:
            assert words[3:5] == ["-m", "sae_diffusion"], where
            words = ["sae", *words[5:]]
        if words[0] == "sae":
            try:
                cli.parse(words[1:])
            except (SystemExit, ValueError) as error:
                pytest.fail(f"{where}: {error} {capsys.readouterr()}")
        elif words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            wanted = [word for word in words[1:] if "=" not in word]
            assert set(wanted) <= set(targets), where
        elif words[0] == "python" and words[1] == "-m":
            assert importlib.util.find_spec(words[2]) is not None, where
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), where
        else:
            assert words[0] in ("pip", "git", "cd", "pre-commit", "ls", "mkdocs"), where


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in page_reader.links(text):
        if re.match(r"(?:https?|mailto):", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{name_of(page)}: {link} leaves the repository"
        if anchor:
            there = page_reader.anchors(target.read_text(encoding="utf-8"))
            assert anchor in there, f"{name_of(page)}: {link}: no such heading, only {sorted(there)}"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = set(re.findall(r"[\w/-]+\.md", nav))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}


@pytest.mark.parametrize("package", [sae_kernels, sae_diffusion], ids=lambda p: p.__name__)
def test_every_public_name_is_in_the_api(package):
    text = (ROOT / "docs" / "api" / f"{package.__name__}.md").read_text(encoding="utf-8")
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
    assert set(package.__all__) <= listed


ROWS = re.compile(r"^\| \[`[^`]+`\]\((?P<path>[^)]+)\) \| (?P<names>`[^|]+`) \|", re.MULTILINE)


@pytest.mark.parametrize("page", [pytest.param(p, id=name_of(p)) for p in PAGES if ROWS.search(p.read_text("utf-8"))])
def test_names_in_tables_of_files_are_in_these_files(page):
    """Rows | file | names | what they do |, as the pages that walk through the code have them."""
    for row in ROWS.finditer(page.read_text(encoding="utf-8")):
        source = (page.parent / row["path"]).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)", row["names"]):
            last = re.escape(name.rpartition(".")[2])
            defined = rf"(?:def|class|__global__ void|void) +{last}\b|^ *(?:self\.)?{last}\b[^\n]*[:=]"
            assert re.search(defined, source, re.MULTILINE), f"{name_of(page)}: {row['path']} has no {name}"


# ---- the reader itself


def test_blocks_of_a_page():
    text = "a\n\n```python\nx = 9\n```\n\n<!-- small\n100 => 2\n-->\n\n```python\ny = x * 100\n```\n<!-- python\nz = 1\n-->\n"
    assert [(s.text, s.line) for s in page_reader.snippets(text)] == [
        ("x = 9\n", 4),
        ("y = x * 2\n", 12),
        ("z = 1\n", 15),
    ]
    with pytest.raises(AssertionError, match="is not in the code"):
        page_reader.snippets(text.replace("100 =>", "7 =>"))


def test_links_and_anchors_of_a_page():
    text = "# A *b* `c_d`\n[x](y.md#z) ![p](q.png)\n`[no](link.md)`\n```\n[no](code.md)\n# no\n```\n## A *b* `c_d`\n"
    assert page_reader.links(text) == ["y.md#z", "q.png"]
    assert page_reader.anchors(text) == {"a-b-c_d", "a-b-c_d-1"}


def test_commands_of_a_page():
    text = "```sh\n# comment\nsae info   # here\nsae train \\\n  --steps 3\n```\n```text\nno\n```\n"
    assert [" ".join(c.split()) for _, c in page_reader.commands(text)] == ["sae info # here", "sae train --steps 3"]


def test_shapes_only_is_what_it_says():
    with FakeTensorMode():
        assert torch.empty(10**9, 10**6).shape == (10**9, 10**6)
    assert Path(ROOT / "docs").is_dir()
