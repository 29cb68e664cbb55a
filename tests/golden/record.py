"""Record the numbers of `cases`, or compare with recorded ones bit for bit.

    python -m tests.golden.record --out tests/golden/numbers.json    # the committed file
    python -m tests.golden.record --out before.json --bits           # before a change that shall keep every bit
    python -m tests.golden.record --compare before.json              # after it, on the same machine

Bits differ between machines, because libraries choose their kernels by the CPU. So the committed file also holds how far
a run with the CPU's narrowest vector instructions went from one with its widest: what other kernels' rounding does to
each case, conditioning included. `check` allows another machine four times that, and some roundings more for cases in
which both happened to agree: solvers divide by noise of 1/100, which makes a hundred units in the last place of one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .cases import RUNS

NUMBERS = Path(__file__).with_name("numbers.json")
NARROW = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
ELEMENTS = 5
SPREADS, ROUNDINGS = 4.0, 256.0


def run(name: str) -> dict[str, Any]:
    """{tensor: {"bits": digest, "numbers": [root mean square, some elements]}} of one case."""
    case, dtype = RUNS[name]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.manual_seed(0)
        return {key: describe(tensor) for key, tensor in case.run(dtype).items()}


def describe(tensor: torch.Tensor) -> dict[str, Any]:
    values = tensor.detach().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode() + values.numpy().tobytes()).hexdigest()
    flat = values.double().flatten()
    places = torch.linspace(0, len(flat) - 1, min(ELEMENTS, len(flat))).long()
    return {"bits": digest[:16], "numbers": [flat.square().mean().sqrt().item(), *flat[places].tolist()]}


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The greatest difference between two runs of a case, over the root mean square of the tensor it is in."""
    assert a.keys() == b.keys(), f"tensors are {sorted(a)}, recorded were {sorted(b)}"
    worst = 0.0
    for key in a:
        scale = b[key]["numbers"][0] or 1.0
        pairs = zip(a[key]["numbers"], b[key]["numbers"], strict=True)
        worst = max(worst, *(abs(x - y) / scale if math.isfinite(x) else math.inf for x, y in pairs))
    return worst


def check(name: str, recorded: dict[str, Any]) -> None:
    """Hold a case to its recorded numbers within what another machine's rounding may do."""
    case, dtype = RUNS[name]
    exact = max(torch.finfo(case.inputs).eps, torch.finfo(dtype).eps)
    allowed = SPREADS * recorded["spread"] + ROUNDINGS * exact
    found = distance(run(name), recorded["tensors"])
    assert found <= allowed, f"{name}: {found:.3e} from what was recorded, allowed {allowed:.3e}"


def record(out: Path, bits_only: bool) -> None:
    cases: dict[str, Any] = {name: {"tensors": run(name)} for name in RUNS}
    if not bits_only:
        with tempfile.TemporaryDirectory() as folder:
            other = Path(folder) / "narrow.json"
            command = [sys.executable, "-m", __spec__.name, "--out", str(other), "--bits"]
            subprocess.run(command, env={**os.environ, **NARROW}, check=True)
            narrow = json.loads(other.read_text(encoding="utf-8"))["cases"]
        for name, case in cases.items():
            case["spread"] = distance(narrow[name]["tensors"], case["tensors"])
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    out.write_text(f'{{"torch": {json.dumps(torch.__version__)}, "cases": {{\n{lines}\n}}}}\n', encoding="utf-8")


def compare(before: Path) -> int:
    """Print every tensor whose bits differ; how many do."""
    recorded = json.loads(before.read_text(encoding="utf-8"))["cases"]
    different = 0
    for name in recorded:
        if name not in RUNS:
            print(f"{name}: is no case any more")
            different += 1
            continue
        now, then = run(name), recorded[name]["tensors"]
        for key in sorted(now.keys() | then.keys()):
            if key not in now or key not in then:
                print(f"{name} {key}: {'new' if key in now else 'gone'}")
            elif now[key]["bits"] != then[key]["bits"]:
                print(f"{name} {key}: other bits, {distance({key: now[key]}, {key: then[key]}):.3e} apart")
            else:
                continue
            different += 1
    print(f"{len(recorded)} cases, {different} tensors differ")
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="file to record into")
    action.add_argument("--compare", type=Path, help="recorded file to compare bits with")
    parser.add_argument("--bits", action="store_true", help="record for --compare only, without the spread")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.out is not None:
        record(options.out, options.bits)
        return 0
    return 1 if compare(options.compare) else 0


if __name__ == "__main__":
    sys.exit(main())
