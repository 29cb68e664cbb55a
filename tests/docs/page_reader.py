"""What the tests of the documentation read out of a Markdown page: its code, links, headings and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"^(?P<mark>```+|~~~+) *(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=mark) *$", re.MULTILINE | re.DOTALL
)
_HIDDEN = re.compile(r"^<!-- (?P<kind>python|small)\n(?P<code>.*?)^-->$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?: +\"[^\"]*\")?\)")
_SOURCE = re.compile(r"<(?:img|source|a)\b[^>]*?\b(?:src|srcset|href)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Code:
    """A fenced block, or one that readers do not see: `<!-- python ... -->`, `<!-- small ... -->`."""

    language: str
    text: str
    line: int


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Code]:
    """In the order of the page; a hidden block has the language "python" or "small"."""
    found = [(m.start(), m["language"], m["code"]) for m in _FENCE.finditer(text)]
    found += [(m.start(), m["kind"], m["code"]) for m in _HIDDEN.finditer(text)]
    return [Code(language, code, text.count("\n", 0, start) + 2) for start, language, code in sorted(found)]


def snippets(text: str) -> list[Code]:
    """The page's Python, in order, each at the size that tests run it at.

    A line "a => b" of a hidden `small` block says that the next Python block is run with b in place of a.
    """
    found, replacements = [], []
    for block in blocks(text):
        if block.language == "small":
            replacements += [line.split(" => ") for line in block.text.splitlines()]
        elif block.language == "python":
            code = block.text
            for old, new in replacements:
                assert old in code, f"line {block.line}: {old!r} is not in the code that it should be made small in"
                code = code.replace(old, new)
            replacements = []
            found.append(Code("python", code, block.line))
    assert not replacements
    return found


def commands(text: str) -> Iterator[tuple[int, str]]:
    """(line, command) of every shell block, continued lines joined."""
    for block in blocks(text):
        if block.language in ("sh", "bash", "shell", "console"):
            lines = block.text.replace("\\\n", " ").splitlines()
            yield from ((block.line, line.strip()) for line in lines if line.strip() and not line.startswith("#"))


def without_code(text: str) -> str:
    """The page without its code, where brackets are no links and `#` no headings."""
    text = _FENCE.sub("", _HIDDEN.sub("", text))
    return re.sub(r"(`+)[^`\n]+?\1", lambda m: "`" * 2 if "](" in m[0] else m[0], text)


def links(text: str) -> list[str]:
    return _LINK.findall(without_code(text)) + _SOURCE.findall(without_code(text))


def anchors(text: str) -> set[str]:
    """The ids of a page's headings, as GitHub and mkdocs make them."""
    found: set[str] = set(re.findall(r"<a id=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#+ +(.+?) *#*$", without_code(text), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).strip()
        slug, count = words.replace(" ", "-"), 0
        while (name := slug if not count else f"{slug}-{count}") in found:
            count += 1
        found.add(name)
    return found
