"""Our ops at their CPU sizes under pytest-benchmark, whose JSON compares commits: `pytest-benchmark compare`.

Peers, gates and ratios are the business of `python -m benchmarks`; this runs under `--benchmark-only` alone.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure, registry

pytest.importorskip("pytest_benchmark")

OPS = ("attention", "convolution", "noise", "magnitude", "qk-prepare")
CASES = [c for c in registry.select("cpu", ops=OPS) if c.name != "weights"]


@pytest.fixture(autouse=True)
def only_when_asked(request: pytest.FixtureRequest, poison: None):
    if not request.config.getoption("benchmark_only", default=False):
        pytest.skip("runs under --benchmark-only")
    # Filling memory with NaN is for tests.
    torch.use_deterministic_algorithms(False)
    with measure.threads(torch.multiprocessing.cpu_count()):
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.name}")
def test_ours(benchmark, case: registry.Case) -> None:
    problem = registry.module_of(case.op).build(case.shape("cpu"), "cpu")
    ours = problem.contenders[0]
    direction = list(ours.launch)[-1]
    problem.check(ours, direction)
    inputs = problem.make_inputs(0)
    benchmark.extra_info.update(direction=direction, shape={k: str(v) for k, v in case.shape("cpu").items()})
    benchmark.pedantic(ours.launch[direction], args=(inputs,), rounds=7, warmup_rounds=1)
