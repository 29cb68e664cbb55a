"""The compile gate: every shipped launch compiled for GPUs that are not there, and held to their limits.

`python compile_gate.py OP ARCHITECTURE` compiles and prints JSON {name: what was counted, or {error}}, in a process of
its own because Triton decides on import whether kernels are compiled or interpreted. `python compile_gate.py --check
[OP ...]` holds all of that to the limits; with `--triton 3.6.0` under that Triton, installed for the time being, in place
of the one at hand. Triton's cache makes an unchanged kernel cheap.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ARCHITECTURES = (80, 90, 120)
# sm_86 and sm_89 run what is compiled for sm_80, in less shared memory.
LIMITS = {80: 101_376, 90: 232_448, 120: 101_376}  # bytes of shared memory, as in _configs.SHARED_MEMORY
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


def compile_one(case: tuple[str, int, str]) -> dict:
    op, architecture, name = case
    import triton
    from shipped_launches import OPS
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sae_kernels._launch import signature

    launch = OPS[op](architecture)[name]
    try:
        source = ASTSource(launch.kernel, *signature(launch))
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
        binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage, code = (
                subprocess.run(
                    [binaries / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
                ).stdout
                for flag in ("-res-usage", "-sass")
            )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "shared": compiled.metadata.shared,
        "registers": int(registers),
        "stack": int(stack),
        "hgmma": code.count("HGMMA"),
        "hmma": code.count("HMMA"),
        "wide_loads": len(re.findall(r"LDG\S*\.128", code)),
        "wide_stores": len(re.findall(r"STG\S*\.128", code)),
        "wide_copies": len(re.findall(r"LDGSTS\S*\.128", code)),
        "boxes": code.count("UTMALDG"),
    }


def compiled(op: str, architecture: int) -> dict[str, dict]:
    """What was counted in each launch of an op, compiled in processes of their own by the Triton that they import."""
    command = [sys.executable, __file__, op, str(architecture)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def failures(op: str, architecture: int, results: dict[str, dict]) -> list[str]:
    """A line for each limit that a launch breaks."""
    from shipped_launches import OPS, is_wide, least_boxes, least_copies

    launches, lines = OPS[op](architecture), []
    if not results:
        lines.append(f"{op}: nothing was compiled")
    for name, got in results.items():
        if "error" in got:
            lines.append(f"{name}: {got['error'][:500]}")
            continue
        stack = STACK_EXCEPTIONS.get((architecture, name), STACK)
        if got["shared"] > LIMITS[architecture]:
            lines.append(f"{name}: {got['shared']} bytes of shared memory, limit {LIMITS[architecture]}")
        if got["stack"] > stack:
            lines.append(f"{name}: {got['stack']} bytes of stack, limit {stack}")
        reads = "eps_kernel" not in name
        if is_wide(op, name) and not (got["wide_stores"] and (got["wide_loads"] or not reads)):
            lines.append(f"{name}: {got['wide_loads']} loads and {got['wide_stores']} stores of 16 bytes")
        sixteen_bit = "float16" in name and "delta" not in name and "streams" not in name
        if architecture == 90 and sixteen_bit and not (got["hgmma"] > 0 and got["hmma"] == 0):
            lines.append(f"{name}: {got['hgmma']} warpgroup and {got['hmma']} warp matrix instructions")
        unaligned = name.removesuffix("-window").endswith(("-s1", "-unaligned"))
        copies = 0 if unaligned else least_copies(op, launches[name], architecture)
        boxes = least_boxes(op, launches[name])
        if got["boxes"] < boxes:
            lines.append(f"{name}: {got['boxes']} copies of boxes, at least {boxes} expected")
        if sixteen_bit and got["wide_copies"] < copies:
            lines.append(
                f"{name}: {got['wide_copies']} 16-byte asynchronous copies, at least {copies} unless alignment is lost"
            )
    return lines


def check(ops: list[str]) -> int:
    """Hold the launches of ops to the limits, print what breaks them, and return how many lines that was."""
    import triton
    from shipped_launches import OPS

    print(f"triton {triton.__version__}")
    count = 0
    for op in ops or OPS:
        for architecture in ARCHITECTURES:
            results = compiled(op, architecture)
            lines = failures(op, architecture, results)
            count += len(lines)
            print(
                f"{op}, sm_{architecture}: {len(results)} launches, {len(lines)} failures",
                *lines,
                sep="\n  ",
                flush=True,
            )
    return count


def install(version: str, folder: str) -> subprocess.CompletedProcess:
    """Put one version of Triton into a folder that, first in PYTHONPATH, stands before the one at hand."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"triton=={version}"]
    return subprocess.run(command, capture_output=True, text=True)


def check_under(version: str, ops: list[str], output: int | None = subprocess.PIPE) -> subprocess.CompletedProcess:
    """`check` under another version of Triton; return code 77, and the reason, where that cannot be installed."""
    with tempfile.TemporaryDirectory() as folder:
        installed = install(version, folder)
        if installed.returncode:
            return subprocess.CompletedProcess(installed.args, 77, "", installed.stderr)
        env = os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
        return subprocess.run([sys.executable, __file__, "--check", *ops], env=env, text=True, stdout=output)


def main() -> int:
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="OP | OP ARCHITECTURE")
    parser.add_argument("--check", action="store_true", help="hold ops (all by default) to the limits")
    parser.add_argument("--triton", metavar="VERSION", help="check under this version")
    args = parser.parse_args()
    if args.triton:
        run = check_under(args.triton, args.arguments, output=None)
        if run.returncode == 77:
            print(f"triton {args.triton} cannot be installed here: {run.stderr}", file=sys.stderr)
        return run.returncode
    if args.check:
        return min(check(args.arguments), 1)
    from shipped_launches import OPS

    op, architecture = args.arguments[0], int(args.arguments[1])
    names = list(OPS[op](architecture))
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        results = pool.map(compile_one, [(op, architecture, name) for name in names])
    print(json.dumps(dict(zip(names, results, strict=True)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
