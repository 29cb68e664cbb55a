"""The committed figures are what docs/figures.py draws."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_mask():
    drawn = runpy.run_path(str(DOCS / "figures.py"))["mask_svg"]()
    assert (DOCS / "figures" / "mask.svg").read_text(encoding="utf-8") == drawn
    cells = [r.get("fill") for r in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}rect")]
    assert len(cells) == 3 * 64 + 3
    # of the first panel 4 frames: 1 + 2 + 3 + 4 pairs of clean ones, 0 + 1 + 2 + 3 of noisy and clean, 4 of noisy ones
    assert [cells[:64].count(color) for color in ("#4184e4", "#e0823d", "#57ab5a")] == [10, 6, 4]
