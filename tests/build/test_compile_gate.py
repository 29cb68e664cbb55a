"""Every shipped Triton configuration compiles for every architecture, within its shared memory and without spills.

Needs no GPU: Triton brings the assembler and the disassembler along.
"""

from __future__ import annotations

import os

import compile_gate
import pytest
from shipped_launches import OPS

from sae_kernels._configs import SHARED_MEMORY

pytest.importorskip("triton")

OLDEST = "3.6.0"


@pytest.mark.parametrize("architecture", compile_gate.ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_compiles_and_fits(op, architecture):
    lines = compile_gate.failures(op, architecture, compile_gate.compiled(op, architecture))
    assert not lines, "\n".join(lines)


def test_limits_are_those_of_the_devices():
    # sm_86 and sm_89 run what is compiled for sm_80, in less shared memory.
    runs = {80: (80, 86, 89), 90: (90,), 120: (120,)}
    assert {a: min(SHARED_MEMORY[b] for b in runs[a]) for a in compile_gate.ARCHITECTURES} == compile_gate.LIMITS


@pytest.mark.skipif("SAE_TRITON_OLDEST" not in os.environ, reason="takes minutes: set SAE_TRITON_OLDEST=1 to run it")
def test_oldest_triton():
    run = compile_gate.check_under(OLDEST, [])
    if run.returncode == 77:
        pytest.skip(f"triton {OLDEST} cannot be installed here: {run.stderr[-300:]}")
    assert run.returncode == 0, run.stdout
