"""Compile an op's shipped launches for an architecture with no GPU: `python compile_gate.py OP ARCHITECTURE`.

Prints JSON {name: {shared, registers, stack, hgmma, hmma, wide_loads, wide_stores, wide_copies} or {error}}. It runs in a process of its own because Triton
decides on import whether kernels are compiled or interpreted. Triton's cache makes an unchanged kernel cheap.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


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


def main() -> None:
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    from shipped_launches import OPS

    op, architecture = sys.argv[1], int(sys.argv[2])
    names = list(OPS[op](architecture))
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        results = pool.map(compile_one, [(op, architecture, name) for name in names])
    print(json.dumps(dict(zip(names, results, strict=True)), indent=1))


if __name__ == "__main__":
    main()
