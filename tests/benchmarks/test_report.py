"""Tables and plots from a committed result file."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from benchmarks import report

SMALL = Path(__file__).parent / "data" / "small.json"


@pytest.fixture
def result() -> dict:
    return report.load([SMALL])[0]


def test_ratio_is_the_peers_time_for_each_unit_over_ours(result):
    by_case = {c["case"]: c for c in result["cases"]}
    base, dense, causal = by_case["16x256"]["results"][:3]
    assert report.ratio(by_case["16x256"], base) == 1
    assert report.ratio(by_case["16x256"], dense) == pytest.approx(dense["median_s"] / base["median_s"])
    # A yardstick does another amount of work: rates are compared.
    assert report.ratio(by_case["16x256"], causal) == pytest.approx(base["flops_per_s"] / causal["flops_per_s"])
    ours, per_frame = by_case["T4"]["results"][:2]
    assert report.ratio(by_case["T4"], per_frame) == pytest.approx(per_frame["median_s"] / (ours["median_s"] / 4))


def test_markdown_has_figures_machine_and_what_is_missing(result):
    text = report.markdown([result])
    assert text.startswith("**Not yet measured on a GPU.**")
    assert "Test CPU, 2 threads" in text and "torch 2.13.0" in text and "commit 0123456789ab" in text
    assert (
        "| 16x256 | fwd | 50 ms | dense-mask SDPA **3.00×**; dense causal, flash * **0.50×** | 0.05 TFLOP/s | 50% of matmul |"
        in text
    )
    assert "two packed flash calls: not there: CUDA only" in text
    assert "mask 2 ms, mask 64 MiB" in text
    assert "red gate, no figures" in text and "RED, no figures: sae_kernels, fwd: out" in text
    assert "WRONG, no figure: relative error 1" in text
    assert "noise/2^28 was not run: 3 s of the budget left." in text


def test_a_warm_cache_is_said(result):
    assert "warm cache" not in report.markdown([result])
    result["cases"][0]["cold"] = False
    assert "- warm cache: the input sets fit in it" in report.markdown([result])


def test_markdown_with_a_gpu_does_not_say_it_is_missing(result):
    gpu = copy.deepcopy(result)
    gpu["environment"] |= {"device": "cuda", "gpu": "NVIDIA H200", "clocks": {"driver_version": "580.1"}}
    text = report.markdown([gpu, result])
    assert "Not yet measured" not in text
    assert "### NVIDIA H200" in text and "driver 580.1" in text and "### Test CPU" in text


def test_short_table_has_one_case_for_each_op_and_all_its_peers(result):
    text = report.short([result])
    assert text.startswith("**Not yet measured on a GPU.**")
    assert "| Test CPU, 2 threads, torch 2.13.0, " in text
    assert "| attention, 16x256, forward | 50 ms | dense-mask SDPA 3.00× |" in text  # the yardstick is left out
    assert text.count("| attention, ") == 1 and "red gate, no figures" in text
    gpu = copy.deepcopy(result)
    gpu["environment"] |= {"device": "cuda", "gpu": "NVIDIA H200"}
    text = report.short([result, gpu])
    assert "Not yet measured" not in text
    assert text.index("| NVIDIA H200, torch") < text.index("| Test CPU, 2 threads")


def written(tmp_path, text: str) -> tuple[list[Path], list[str]]:
    pages = [tmp_path / "page.md", tmp_path / "README.md"]
    for page in pages:
        page.write_text(text)
    options = ["--page", str(pages[0]), "--readme", str(pages[1]), "--plots", str(tmp_path)]
    return pages, ["report", str(SMALL), *options]


def test_page_and_readme_are_edited_between_the_markers_only(tmp_path, result):
    pages, command = written(tmp_path, f"before\n{report.BEGIN}\nformer figures\n{report.END}\nafter\n")
    assert cli.main(command) == 0
    texts = [page.read_text() for page in pages]
    for text, inside in zip(texts, (report.markdown([result]), report.short([result]))):
        assert text.startswith(f"before\n{report.BEGIN}\n{inside}")
        assert text.endswith(f"{report.END}\nafter\n") and "former" not in text
    assert "](small-ratios.png)" in texts[0] and ".png" not in texts[1]
    assert cli.main(command) == 0
    assert [page.read_text() for page in pages] == texts


@pytest.mark.parametrize(
    "text", ["nothing", f"{report.END} {report.BEGIN}", f"{report.BEGIN}{report.BEGIN}{report.END}"]
)
def test_a_page_without_its_markers_is_left_alone(text, tmp_path, capsys):
    pages, command = written(tmp_path, text)
    assert cli.main(command) == 2
    assert "must hold the markers" in capsys.readouterr().err
    assert [page.read_text() for page in pages] == [text, text]


def test_committed_tables_are_of_the_committed_files():
    root = Path(__file__).parents[2]
    results = report.load(sorted(p for p in (root / "benchmarks" / "results").glob("20*.json")))
    plots = sorted(p.name for p in (root / "benchmarks" / "results").glob("*.png"))
    page = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    shown = page.partition(f"{report.BEGIN}\n")[2].partition(f"\n{report.END}")[0]
    assert shown.startswith(report.markdown(results))
    assert sorted(Path(name).name for name in re.findall(r"\]\(([^)]+\.png)\)", shown)) == plots
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"{report.BEGIN}\n{report.short(results)}\n{report.END}" in readme


def test_other_files_are_refused(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"benchmarks": []}))
    assert cli.main(["report", "--print", str(other)]) == 2
    assert "is not a benchmark result" in capsys.readouterr().err


def test_plots(result, tmp_path):
    pytest.importorskip("matplotlib")
    paths = report.plot(result, tmp_path, "small")
    assert [p.name for p in paths] == ["small-ratios.png", "small-scaling.png", "small-roofline.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    empty = result | {"cases": []}
    assert report.plot(empty, tmp_path, "empty") == []


def test_table_of_a_case_prints_without_rich(result, capsys, monkeypatch):
    import builtins

    real = builtins.__import__

    def without_rich(name, *rest):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    report.show(result["cases"][0])
    printed = capsys.readouterr().out
    assert "dense-mask SDPA" in printed and "150 ms" in printed and "3.00" in printed


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs")])
def test_durations(seconds, text):
    assert report.duration(seconds) == text
