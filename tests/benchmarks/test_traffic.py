"""Launches and bytes of a training step, counted: by hand on small functions, and what the plans promise on a network."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import ROOT, traffic
from benchmarks.__main__ import main
from sae_kernels import FrameLayout, mp_silu, mp_sum, pixel_norm_silu, token_noise

SHAPE = {"preset": "nano", "B": 1, "T": 2, "K": 1}


def counted(function):
    mode = traffic.Count()
    with mode:
        function()
    return mode.found


def test_library_calls_by_hand():
    x, row = torch.randn(8, 100), torch.randn(100)
    assert counted(lambda: x.t().view(-1, 8)[3:]) == []
    assert counted(lambda: x + row) == [("add", 1, 4 * (800 + 100 + 800))]
    assert counted(lambda: x + row.expand(8, 100)) == [("add", 1, 4 * (800 + 100 + 800))]
    assert counted(lambda: x.mul_(2)) == [("mul_", 1, 4 * 2 * 800)]
    assert counted(lambda: torch.mul(x, 2, out=torch.empty(8, 100))) == [("mul", 1, 4 * 2 * 800)]
    assert counted(lambda: x.bfloat16()) == [("_to_copy", 1, 6 * 800)]
    # A composition is what it is made of.
    names = [name for name, *_ in counted(lambda: torch.nn.functional.linear(x, torch.randn(3, 100)))]
    assert names == ["randn", "mm"] or names == ["randn", "addmm"] or names == ["randn", "linear"]


def test_our_ops_are_what_they_run_on_the_cpu():
    x = torch.randn(2, 8, 3, 4, 4)
    one = 4 * x.numel()
    assert counted(lambda: mp_silu(x, impl="composed")) == [
        ("sae_kernels::mp_silu/silu", 1, 2 * one),
        ("sae_kernels::mp_silu/mul_", 1, 2 * one),
    ]
    from sae_kernels import _extension

    if _extension.library("cpu") is None:
        data, layout = torch.randn(1, 3, 50), FrameLayout(3, 1)
        scale = torch.ones(1, 6)
        found = counted(lambda: token_noise(data, scale, scale, layout, seed=1, impl="cpp"))
        assert found[-1][:2] == ("sae_kernels::token_noise_fwd/sae_kernels_native::token_noise_fwd", 1)
        assert 4 * (150 + 6 + 300) <= found[-1][2] <= 4 * (150 + 12 + 300)


def test_our_ops_are_their_plans_on_a_gpu():
    """On meta tensors: one kernel for each, that reads its inputs once and writes its outputs once."""
    x = torch.empty(2, 8, 3, 4, 4, device="meta").contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    one, column = 4 * x.numel(), 4 * 2 * 3 * 4 * 4
    with traffic.choosing(traffic.fastest):
        assert counted(lambda: mp_silu(x)) == [("sae_kernels::mp_silu/mp_silu_fwd_kernel", 1, 2 * one)]
        assert counted(lambda: pixel_norm_silu(x)) == [
            ("sae_kernels::pixel_norm_silu/pixel_norm_fwd_kernel", 1, 3 * one + column)
        ]
        y = mp_sum(x, x * 1, 0.3, limit=2.0)
        found = counted(lambda: torch.autograd.grad(y, x, torch.empty_like(y)))
    assert found[0] == ("sae_kernels::mp_sum_bwd/mp_sum_bwd_kernel", 1, 4 * one)
    with traffic.choosing(traffic.plain):
        names = [name for name, *_ in counted(lambda: pixel_norm_silu(x))]
    assert names == ["linalg_vector_norm", "div", "add", "div", "silu", "div"]


@pytest.fixture(scope="module")
def counts():
    return {device: traffic.count(SHAPE, device) for device in ("cpu", "cuda")}


def test_step_of_a_network(counts):
    for by_name in counts.values():
        for result in by_name.values():
            assert result["launches"] == sum(n for n, _ in result["ops"].values()) > 300
            assert result["bytes"] == sum(moved for _, moved in result["ops"].values())
        assert by_name["sae_kernels"]["bytes"] < by_name["plain PyTorch"]["bytes"]
    ours, plain = (counts["cuda"][name] for name in ("sae_kernels", "plain PyTorch"))
    assert ours["launches"] < plain["launches"] / 3 and ours["bytes"] < plain["bytes"] / 2
    # Nothing of the magnitude chain, of the noise or of the loss is left to PyTorch.
    launched = {name.split("/")[0]: set() for name in ours["ops"]}
    for name in ours["ops"]:
        op, _, what = name.partition("/")
        launched[op].add(what)
    for op in ("pixel_norm_silu", "mp_silu", "modulated_silu", "mp_sum", "mp_cat"):
        for direction in (op, f"{op}_bwd"):
            (kernel,) = launched[f"sae_kernels::{direction}"]
            assert kernel.endswith("_kernel"), kernel
    for op in ("normalize_weights_", "normalize_weights"):
        assert launched[f"sae_kernels::{op}"] == {"sae_kernels_native::normalize_weights"}
        assert ours["ops"][f"sae_kernels::{op}/sae_kernels_native::normalize_weights"][0] == 1
    assert ours["ops"]["sae_kernels::normalize_weights_bwd/sae_kernels_native::normalize_weights_bwd"][0] == 1
    assert "sae_kernels_native::edm_loss" in launched["sae_kernels::edm_loss_fwd"]
    assert "sae_kernels_native::edm_loss" in launched["sae_kernels::edm_loss_bwd"]
    assert not any(op in ours["ops"] for op in ("silu", "randn_like", "normal_", "hardtanh", "linalg_vector_norm"))


def test_profiler_and_mode_agree_on_what_runs(counts):
    """They differ by what PyTorch calls inside one of its own operations, which a dispatch mode does not see."""
    for result in counts["cpu"].values():
        assert 0.9 < result["profiled"] / result["launches"] < 1.15


def test_written_file_and_page(counts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(traffic, "count", lambda shape, device: counts[device])
    page = tmp_path / "page.md"
    page.write_text(f"a\n{traffic.BEGIN}\nold\n{traffic.END}\nz\n")
    path = tmp_path / "t.json"
    assert main(["traffic", "--preset", "nano", "--T", "2", "--json", str(path), "--page", str(page)]) == 0
    result = json.loads(path.read_text())
    assert result["shape"] == SHAPE and result["counts"] == json.loads(json.dumps(counts))
    text = page.read_text()
    assert text.startswith("a\n") and text.endswith("\nz\n") and "old" not in text
    assert f"| {counts['cuda']['sae_kernels']['launches']:,} |" in text
    assert text.split("\n", 2)[2].startswith("One training step of the nano preset, 1 x 2 frames")
    page.write_text("no markers")
    assert main(["traffic", "--json", str(path), "--page", str(page)]) == 2


def test_committed_table_is_of_the_committed_file():
    path = ROOT / "benchmarks" / "results" / "traffic.json"
    assert traffic.table(json.loads(path.read_text())) in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
