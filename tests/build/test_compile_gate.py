"""Every shipped Triton configuration compiles for every architecture, within its shared memory and without spills.

Needs no GPU: Triton brings the assembler and the disassembler along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shipped_launches import OPS, is_wide, least_boxes, least_copies

from sae_kernels._configs import SHARED_MEMORY

pytest.importorskip("triton")

ARCHITECTURES = (80, 90, 120)
# sm_86 and sm_89 run what is compiled for sm_80, in less shared memory.
LIMITS = {80: min(SHARED_MEMORY[a] for a in (80, 86, 89)), 90: SHARED_MEMORY[90], 120: SHARED_MEMORY[120]}
# Bytes of stack a thread may spill to: 32 of the 255 registers' worth.
STACK = 128
# sm_90 alone trades spills for larger tiles. In the loops over full tiles none of the forward's instructions at D = 128
# are spills, 13 of 494 of dk/dv's, and at D = 256 14 of 519 and 32 of 787.
STACK_EXCEPTIONS = {
    (90, "frame_attention_fwd_kernel-bfloat16-D128-128x128-w8-s2-window"): 192,
    (90, "frame_attention_fwd_kernel-bfloat16-D256-128x64-w8-s2"): 192,
    (90, "frame_attention_bwd_dkdv_kernel-bfloat16-D128-64x128-w8-s2"): 160,
    (90, "frame_attention_bwd_dkdv_kernel-bfloat16-D128-64x128-w8-s2-window"): 160,
    (90, "frame_attention_bwd_dkdv_kernel-bfloat16-D256-32x64-w8-s2"): 320,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_compiles_and_fits(op, architecture):
    command = [sys.executable, str(Path(__file__).with_name("compile_gate.py")), op, str(architecture)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    results, launches = json.loads(run.stdout), OPS[op](architecture)
    assert results
    failures = []
    for name, got in results.items():
        if "error" in got:
            failures.append(f"{name}: {got['error'][:500]}")
            continue
        stack = STACK_EXCEPTIONS.get((architecture, name), STACK)
        if got["shared"] > LIMITS[architecture]:
            failures.append(f"{name}: {got['shared']} bytes of shared memory, limit {LIMITS[architecture]}")
        if got["stack"] > stack:
            failures.append(f"{name}: {got['stack']} bytes of stack, limit {stack}")
        reads = "eps_kernel" not in name
        if is_wide(op, name) and not (got["wide_stores"] and (got["wide_loads"] or not reads)):
            failures.append(f"{name}: {got['wide_loads']} loads and {got['wide_stores']} stores of 16 bytes")
        sixteen_bit = "float16" in name and "delta" not in name and "streams" not in name
        if architecture == 90 and sixteen_bit and not (got["hgmma"] > 0 and got["hmma"] == 0):
            failures.append(f"{name}: {got['hgmma']} warpgroup and {got['hmma']} warp matrix instructions")
        unaligned = name.removesuffix("-window").endswith(("-s1", "-unaligned"))
        copies = 0 if unaligned else least_copies(op, launches[name], architecture)
        if got["boxes"] < least_boxes(op, launches[name]):
            failures.append(
                f"{name}: {got['boxes']} copies of boxes, at least {least_boxes(op, launches[name])} expected"
            )
        if sixteen_bit and got["wide_copies"] < copies:
            failures.append(
                f"{name}: {got['wide_copies']} 16-byte asynchronous copies, at least {copies} unless alignment is lost"
            )
    assert not failures, "\n".join(failures)
