"""The committed study: complete, and what the documentation shows is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from sae_diffusion.series.study import OWN, SHARED, table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "series"


def test_study_is_complete_and_in_the_documentation():
    result = json.loads((RESULTS / "windows.json").read_text(encoding="utf-8"))
    done, cells = result["cells"].split(" of ")
    assert done == cells
    assert len(result["settings"]["seeds"]) >= 2
    for row in result["rows"]:
        assert row["seeds"] == result["settings"]["seeds"] and row["training"] in (SHARED, OWN)
        assert row["q25"] <= row["median"] <= row["q75"]
    assert (RESULTS / "windows.md").read_text(encoding="utf-8").strip() == table(result)
    page = (ROOT / "docs" / "series.md").read_text(encoding="utf-8")
    assert table(result) in page
    assert f"{result['cpu_minutes']} minutes of one core" in page and result["command"] in page
    assert (RESULTS / "windows.png").stat().st_size < 200_000
