"""The registry, the timing, the result file and the command line."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import measure, registry, run
from benchmarks.registry import Case

DRY = run.Options(seconds=0.01, dry=True)


def test_list_names_every_case(capsys):
    assert cli.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for op in registry.OPS:
        for case in registry.module_of(op).CASES:
            assert f"{op}/{case.name} " in printed
    assert "attention/wan-480p " in printed


def test_cases_are_unique_described_and_ordered():
    cases = [c for op in registry.OPS for c in registry.module_of(op).CASES]
    assert len({(c.op, c.name) for c in cases}) == len(cases)
    assert all(c.about and (c.cpu or c.cuda) for c in cases)
    for op in registry.OPS:
        assert registry.select("cpu", ops=[op], dry=True), op
        assert registry.select("cpu", ops=[op]), op
        assert registry.select("cuda", ops=[op], quick=True), op
    gpu = registry.select("cuda")
    assert [c.priority for c in gpu] == sorted(c.priority for c in gpu)
    assert gpu[0].op == "attention" and not any(c.dry for c in gpu)


def test_selection_by_name_part_and_device():
    assert [c.name for c in registry.select("cuda", case="wan-480p")] == ["wan-480p"]
    assert all("lunar" in c.name for c in registry.select("cpu", contains="lunar"))
    assert registry.select("cpu", contains="attention/wan") == []
    with pytest.raises(ValueError, match=r"case: 'wan-480p' has no size for cpu"):
        registry.select("cpu", case="wan-480p")
    with pytest.raises(ValueError, match=r"case: must be one of .*16x256.*, got 'nope'"):
        registry.select("cpu", case="nope")
    with pytest.raises(ValueError, match=r"op: must be one of attention.*, got 'nope'"):
        registry.select("cpu", ops=["nope"])


def test_wrong_requests_exit_with_two_and_a_reason(capsys):
    assert cli.main(["--case", "nope", "--device", "cpu"]) == 2
    assert cli.main(["--filter", "nope", "--device", "cpu"]) == 2
    errors = capsys.readouterr().err
    assert "error: case: must be one of" in errors
    assert "error: no case for cpu matches" in errors


# --- timing


def test_contenders_take_turns_and_input_sets_rotate():
    log = []

    def calls(name):
        return [lambda i=i: log.append((name, i)) for i in range(3)]

    times = measure.interleaved({"a": calls("a"), "b": calls("b")}, "cpu", 10.0, min_rounds=4, max_rounds=4)
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4}
    # Three rounds to warm up, then four that begin with another contender each.
    assert log[6:] == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 0), ("a", 0)]


def test_timing_ends_with_its_time_and_measures_it(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        return {"call": [lambda: clock.__setitem__(0, clock[0] + seconds)]}

    # Three rounds to warm up, then rounds while another one ends before its time.
    assert measure.interleaved(takes(0.25), "cpu", 2.0)["call"] == [0.25] * 7
    assert clock[0] == 10 * 0.25
    # Slower than its time: three rounds. Faster: at least five, at most 200.
    assert measure.interleaved(takes(4.0), "cpu", 2.0)["call"] == [4.0] * 3
    assert measure.interleaved(takes(0.5), "cpu", 1.0)["call"] == [0.5] * 5
    assert len(measure.interleaved(takes(0.0), "cpu", 1.0)["call"]) == 200


def test_summary_is_median_and_quartiles():
    assert measure.summary([4.0, 1.0, 3.0, 2.0, 100.0]) == {"median_s": 3.0, "q25_s": 2.0, "q75_s": 4.0, "rounds": 5}
    assert measure.summary([2.0]) == {"median_s": 2.0, "q25_s": 2.0, "q75_s": 2.0, "rounds": 1}


def test_peak_memory_counts_what_is_alive_at_once():
    def call():
        a = torch.ones(1 << 18)
        b = a + 1
        del a
        return b * 2

    torch.use_deterministic_algorithms(False)  # the NaN filling would count as operations
    peak, launches = measure.peak_memory(call, "cpu")
    assert 2 << 20 <= peak < (2 << 20) + 4096
    assert launches == 3


def test_leaves_are_operations_that_call_no_other():
    def op(start, length, thread=1, name="aten::mul"):
        return {"cat": "cpu_op", "name": name, "tid": thread, "ts": start, "dur": length}

    # [0, 10) holds [1, 4) and [5, 9), which holds [6, 7); another thread's operation at the same time is its own.
    events = [op(0, 10), op(1, 3), op(5, 4), op(6, 1), op(2, 1, thread=2)]
    events += [op(1.5, 1, name="aten::empty"), op(6.2, 0.1, name="aten::view"), {"cat": "user_annotation"}]
    assert measure._leaves(events) == 3


@pytest.mark.parametrize("cache", [1 << 20, 32 << 20, 480 << 20])
def test_input_sets_outgrow_the_cache_and_fit_in_memory(cache):
    plenty = 1 << 50
    assert measure.number_of_sets(cache // 4, cache, plenty, 64) == 17
    assert measure.number_of_sets(8 * cache, cache, plenty, 64) == 2
    assert measure.number_of_sets(1, cache, plenty, 64) == 64
    assert measure.number_of_sets(1 << 60, cache, plenty, 64) == 1
    # A quarter of free memory holds no more, whatever the cache.
    assert measure.number_of_sets(cache // 4, cache, 6 * cache, 64) == 6
    assert measure.number_of_sets(cache // 4, cache, 0, 64) == 1
    assert measure.outgrow(cache // 4, 5, cache) and not measure.outgrow(cache // 4, 4, cache)
    assert not measure.outgrow(8 * cache, 1, cache)


def test_the_cache_is_the_largest_that_linux_tells_or_32_mib(tmp_path):
    for index, size in enumerate(("48K", "2048K", "480M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert measure.cache_bytes("cpu", tmp_path) == 480 << 20
    assert measure.cache_bytes("cpu", tmp_path / "nowhere") == 32 << 20
    assert measure.free_bytes("cpu") > 0


def test_environment_says_what_ran_where(monkeypatch):
    found = measure.environment("cpu")
    for key in ("commit", "date", "cpu", "threads", "python", "torch", "triton", "cudnn", "load_average"):
        assert key in found
    assert measure.machine_slug({"cpu": "AMD EPYC", "cpu_count": 2}) == "amd-epyc-2-cores"
    assert measure.machine_slug({"gpu": "NVIDIA H200"}) == "nvidia-h200"
    monkeypatch.setattr(measure, "ROOT", "/nonexistent")
    assert measure.environment("cpu")["commit"] == "unknown"


# --- the result file

CASE_KEYS = {"op", "case", "about", "device", "shape", "dtype", "unit", "flops", "bytes", "gate", "results", "missing", "wrong", "input_sets", "cold", "seconds"}  # fmt: skip
RESULT_KEYS = {"contender", "kind", "direction", "note", "median_s", "q25_s", "q75_s", "rounds", "units", "setup", "peak_bytes", "launches"}  # fmt: skip


def test_result_file_has_its_schema_and_names_missing_peers(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = [
        "--op",
        "attention",
        "--op",
        "noise",
        "--device",
        "cpu",
        "--dry",
        "--json",
        str(path),
        "--threads",
        "1",
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["schema"] == run.SCHEMA and result["complete"] and result["not_run"] == []
    assert set(result["ceilings"]) == {"matmul_size", "matmul_flops_per_s", "copy_size", "copy_bytes_per_s"}
    assert set(result["ceilings"]["matmul_flops_per_s"]) == {"fp32", "bf16"}
    assert [c["op"] for c in result["cases"]] == ["attention", "noise"]
    for case in result["cases"]:
        assert set(case) == CASE_KEYS
        for entry in case["results"]:
            assert set(entry) >= RESULT_KEYS
    (fwd, *_) = result["cases"][0]["results"]
    assert fwd["flops_per_s"] == pytest.approx(result["cases"][0]["flops"]["fwd"] / fwd["median_s"])
    assert fwd["fraction_of_matmul"] > 0 and fwd["fraction_of_copy"] > 0
    missing = {(m["contender"], m["direction"]): m["reason"] for m in result["cases"][0]["missing"]}
    assert missing[("compiled FlexAttention", "fwd+bwd")] == "PyTorch has no backward pass for it on the CPU"
    assert missing[("two packed flash calls", None)] == "variable-length flash attention is CUDA only"
    assert missing[("compiled FlexAttention", "fwd")] == "not compiled in a dry run"
    for (contender, _), reason in missing.items():
        assert contender in printed and reason in printed


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Three cases of ten seconds; the second cannot be built."""
    clock = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])

    def record(case, device, options, limits):
        clock[0] += 10
        if case.name == "bad":
            raise RuntimeError("no memory\nfor this")
        return run._blank(case, device) | {"gate": {"ok": True, "reason": None}}

    monkeypatch.setattr(run, "run_case", record)
    monkeypatch.setattr(measure, "ceilings", lambda *a, **o: {})
    return [Case("noise", name, "toy", cpu={}) for name in ("good", "bad", "late")]


def test_failure_of_a_case_costs_only_that_case(toy, tmp_path):
    path, seen = tmp_path / "result.json", []

    def show(record):
        # Written before it is shown next time: at the second case the first is on disk.
        seen.append(len(json.loads(path.read_text())["cases"]) if path.exists() else 0)

    result = run.run_all(toy, "cpu", DRY, path, show, lambda text: None)
    assert [c["gate"]["ok"] for c in result["cases"]] == [True, False, True]
    assert result["cases"][1]["gate"]["reason"] == "RuntimeError: no memory"
    assert seen == [0, 1, 2]
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))


def test_budget_leaves_out_what_would_not_end_in_time(toy):
    result = run.run_all(toy, "cpu", run.Options(budget=25), None)
    assert [c["case"] for c in result["cases"]] == ["good", "bad"]
    assert [n["case"] for n in result["not_run"]] == ["late"]
    assert result["not_run"][0]["reason"] == "5 s of the budget left"
    assert not result["complete"]


def test_the_process_starts_again_with_a_warm_allocator_once(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--dry"])
    monkeypatch.setattr(cli.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in cli.WARM_ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    cli._start_with_warm_allocator()
    ((program, arguments, environment),) = started
    assert program == sys.executable and arguments[1:] == ["-m", "benchmarks", "--dry"]
    assert environment["MALLOC_MMAP_MAX_"] == "0" and environment["PATH"] == os.environ["PATH"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--allocator", "as-found"])
    cli._start_with_warm_allocator()
    assert len(started) == 1
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--json", "as-found.json"])
    for name, value in cli.WARM_ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    cli._start_with_warm_allocator()
    assert len(started) == 1
