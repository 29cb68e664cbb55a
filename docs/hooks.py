"""What mkdocs does not do by itself: pictures from benchmarks/results, links to sources, nothing from outside.

Pages are written to be read in the repository too, where `../benchmarks/results/x.png` and `../sae_kernels/layout.py`
are links that work.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# A link, or a picture with !, whose target leaves docs/.
OUTSIDE_DOCS = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+)([^)#\s]+)[^)]*\)")
# What a browser would fetch by itself: pictures, styles, scripts, fonts.
FETCHED = re.compile(
    r"""<(?:script|img|source|iframe|video|audio)\b[^>]*\bsrc(?:set)?=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon|dns-prefetch))[^>]*\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|(?:@import\s+|url\()["']?((?:https?:)?//[^"')\s]+)""",
    re.IGNORECASE,
)


def on_files(files, config):
    """Adds the pictures of benchmarks/results as results/..."""
    for path in sorted(RESULTS.rglob("*.png")):
        uri = f"results/{path.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Pictures are taken from results/; a link to a source file becomes its text."""
    here = ROOT / "docs" / page.file.src_uri
    up = "../" * page.file.src_uri.count("/")

    def inside(match: re.Match) -> str:
        target = (here.parent / match[3] / match[4]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        if match[1] and target.is_relative_to(RESULTS):
            return f"![{match[2]}]({up}results/{target.relative_to(RESULTS).as_posix()})"
        if match[1] or not target.exists():
            raise PluginError(f"{page.file.src_uri}: {match[0]} leads nowhere")
        return match[2]

    return OUTSIDE_DOCS.sub(inside, markdown)


def on_post_build(config):
    """The site must need nothing from outside."""
    found = []
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for match in FETCHED.finditer(path.read_text(encoding="utf-8")):
                found.append(f"{path.name}: {next(filter(None, match.groups()))}")
    if found:
        raise PluginError("pages fetch from outside: " + "; ".join(found[:5]))
