"""Builds the C++ extension with the LibTorch stable ABI: one library for the CPU, one for CUDA where nvcc is.

A library that cannot be built never fails the installation: sae_kernels/_build.json records the reason, and
`python -m sae_kernels` shows it. Everything else lies in pyproject.toml. Environment variables:

    CXX               the C++ compiler (default: c++)
    SAE_CPU_FLAGS     further flags for its compiler and linker, such as -fsanitize=address
    SAE_SKIP_CPU=1    build no CPU library
    SAE_SKIP_CUDA=1   build no CUDA library
    SAE_BUILD_CUDA=1  build the CUDA library although torch is a CPU build, which will not load it
    SAE_CUDA_ARCHS    default "80;90a;120"
    CUDA_HOME         where bin/nvcc is, unless it is on PATH
    MAX_JOBS          compilers run at a time (default: the number of processors)
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Interfaces of torch 2.11 and later; one library serves them all.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# FP contraction is off so that a result does not depend on where in a vector its element lies.
CPU_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
             "-fno-trapping-math"]  # fmt: skip
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
}
# Compiled once for each of these.
INNER_LOOPS = ("cpu_kernels", "cpu_attention", "cpu_convolution", "cpu_steps", "cpu_norms")
CUDA_ARCHS = "80;90a;120"


WITHOUT_CPP = """sae_kernels is being built WITHOUT its C++ kernels: ops on the CPU will be slower.
Install torch and a C++ compiler first, then: pip install --no-build-isolation ."""


class Unavailable(Exception):
    """A library that is not built, and why."""


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def run_all(commands: list[list[str]]) -> str:
    """Run compilers in parallel; returns what they printed."""

    def run(command: list[str]) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise Unavailable(f"{command[0]} does not run: {error}") from error
        if done.returncode:
            raise Unavailable(f"{' '.join(command)}\n{(done.stderr or done.stdout).strip()[-2000:]}")
        return done.stdout + done.stderr

    with ThreadPoolExecutor(jobs()) as pool:
        return "".join(pool.map(run, commands))


def find_torch():
    try:
        import torch
    except ImportError as error:
        raise Unavailable(
            f"torch cannot be imported while building ({error}); use pip's --no-build-isolation"
        ) from None
    return torch


def torch_flags() -> tuple[list[str], list[str]]:
    """(to compile, to link) against the torch that is installed."""
    home = Path(find_torch().__file__).parent
    return [f"-I{home / 'include'}", TARGET], [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]


def build_cpu(library: Path, scratch: Path) -> str:
    if os.environ.get("SAE_SKIP_CPU") == "1":
        raise Unavailable("SAE_SKIP_CPU=1 when it was built")
    if os.name != "posix":
        raise Unavailable(f"its build is written for Linux and macOS, not {platform.system()}")
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler) is None:
        raise Unavailable(f"there was no C++ compiler ({compiler}) when it was built")
    includes, links = torch_flags()
    further = shlex.split(os.environ.get("SAE_CPU_FLAGS", ""))
    sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    units = [
        (f"{loops}_{name}", f"{loops}.cpp", [*flags, f"-DSAE_ISA={name}"])
        for loops in INNER_LOOPS
        for name, flags in sets.items()
    ]
    dispatch = ["-DSAE_X86"] if len(sets) > 1 else []
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        if source.stem not in INNER_LOOPS:
            units.append((source.stem, source.name, [*dispatch, *includes]))
    objects = [str(scratch / f"{name}.o") for name, _, _ in units]
    log = run_all(
        [
            [compiler, *CPU_FLAGS, *flags, *further, "-c", str(ROOT / "csrc" / source), "-o", target]
            for (_, source, flags), target in zip(units, objects, strict=True)
        ]
    )
    link = [compiler, "-shared", *(further or ["-s"]), *objects, *links, "-o", str(library)]
    return log + run_all([link])


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or shutil.which(nvcc) is None:
        raise Unavailable("there was no nvcc when it was built (set CUDA_HOME or PATH)")
    return nvcc


def build_cuda(library: Path, scratch: Path) -> str:
    if os.environ.get("SAE_SKIP_CUDA") == "1":
        raise Unavailable("SAE_SKIP_CUDA=1 when it was built")
    nvcc = find_nvcc()
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    if not sources:
        raise Unavailable("it has no sources")
    includes, links = torch_flags()
    if find_torch().version.cuda is None and os.environ.get("SAE_BUILD_CUDA") != "1":
        raise Unavailable("torch was a CPU build when it was built (SAE_BUILD_CUDA=1 builds it all the same)")
    archs = (os.environ.get("SAE_CUDA_ARCHS") or CUDA_ARCHS).split(";")
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # PTX of the first, for devices between and after those named.
    gencode.append(f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}")
    flags = ["-std=c++20", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v,-warn-spills",
             f"--threads={jobs()}"]  # fmt: skip
    objects = [str(scratch / f"{source.stem}.cu.o") for source in sources]
    log = run_all(
        [
            [nvcc, *flags, *gencode, *includes, "-c", str(source), "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
    )
    return log + run_all([[nvcc, "-shared", "--cudart=static", *gencode, *objects, *links, "-o", str(library)]])


def build(directory: Path, verbose: bool = False) -> list[Path]:
    """Build what can be built into `directory`; returns the files made, _build.json last."""
    directory.mkdir(parents=True, exist_ok=True)
    reasons: dict[str, str | None] = {}
    files = []
    for name, builder in (("cpu", build_cpu), ("cuda", build_cuda)):
        library = directory / f"_{name}.so"
        library.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                log = builder(library, Path(scratch))
                reasons[name] = None
                files.append(library)
                if verbose:
                    print(log)
            except Unavailable as error:
                reasons[name] = str(error)
                print(f"sae_kernels: the {name} library is not built: {error}")
                if name == "cpu" and os.environ.get("SAE_SKIP_CPU") != "1":
                    print(f"{'*' * 78}\n{WITHOUT_CPP}\n{'*' * 78}", file=sys.stderr)
    record = directory / "_build.json"
    record.write_text(json.dumps(reasons, indent=2) + "\n")
    return [*files, record]


class BuildNative(build_ext):
    def run(self) -> None:
        editable = self.inplace or getattr(self, "editable_mode", False)
        root = ROOT if editable else Path(self.build_lib)
        self.made = build(root / "sae_kernels", verbose=os.environ.get("SAE_BUILD_LOG") == "1")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in getattr(self, "made", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]


class PlatformWheel(bdist_wheel):
    """The libraries know torch, not Python: a wheel for all Pythons 3 of the platform, or of any if there are none."""

    def get_tag(self) -> tuple[str, str, str]:
        made = self.get_finalized_command("build_ext").get_outputs()
        native = any(path.endswith(".so") for path in made)
        return "py3", "none", super().get_tag()[2] if native else "any"


setup(
    ext_modules=[Extension("sae_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
