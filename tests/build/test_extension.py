"""The C++ build: a wheel that imports elsewhere, every way in which it may be missing, and CUDA that does not spill."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import sae_kernels
from sae_kernels import FrameLayout, _extension
from sae_kernels.__main__ import report

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
CUDA_SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))


def run(*command: str, cwd: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SAE_") and k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env=clean | {"MAX_JOBS": "2"} | environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build(to: Path, **environment: str) -> tuple[dict[str, str | None], str]:
    """What setup.py records when it builds into `to`, and what it printed."""
    log = run(sys.executable, "setup.py", "build_ext", f"--build-lib={to}", cwd=ROOT, **environment)
    return json.loads((to / "sae_kernels" / "_build.json").read_text()), log


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a fresh clone has, so that nothing already built is found."""
    to = tmp_path_factory.mktemp("clone")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "*.egg-info")
    for name in ("csrc", "sae_kernels", "python"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    return to


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_wheel_imports_in_a_clean_place_and_runs_its_own_library(source, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), cwd=source, SAE_SKIP_CUDA="1")
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"sae_kernels-.*-py3-none-(linux|macosx).*\.whl", wheel.name), wheel.name
    clean = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", str(clean), str(wheel), cwd=tmp_path)
    code = """
import json, pathlib, torch, sae_kernels, sae_diffusion
from sae_kernels import _extension
assert sae_kernels.token_noise_eps((9,), seed=1, impl="cpp").isfinite().all()
home = pathlib.Path(sae_kernels.__file__).parent
print(home, _extension.library("cpu"), json.loads((home / "_build.json").read_text())["cuda"], sep="\\n")
"""
    home, why_not, cuda = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(clean)).splitlines()
    assert Path(home) == clean / "sae_kernels"
    assert why_not == "None" and cuda == "SAE_SKIP_CUDA=1 when it was built"
    names = zipfile.ZipFile(wheel).namelist()
    assert "sae_kernels/_cpu.so" in names and "sae_kernels/_cuda.so" not in names
    packages = {str(p.parent.relative_to(ROOT)) for p in (ROOT / "sae_kernels").rglob("__init__.py")}
    packages |= {str(p.parent.relative_to(ROOT / "python")) for p in (ROOT / "python").rglob("__init__.py")}
    assert packages <= {str(Path(name).parent) for name in names}
    tops = {Path(name).parts[0] for name in names}
    assert tops == {"sae_kernels", "sae_diffusion", f"sae_kernels-{sae_kernels.__version__}.dist-info"}


def test_wheel_without_libraries_has_a_name_of_its_own(source, tmp_path):
    """It must not be taken, from a cache or an index, for the one with libraries."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(
        *pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), cwd=source,
        SAE_SKIP_CPU="1", SAE_SKIP_CUDA="1",
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"sae_kernels-.*-py3-none-any\.whl", wheel.name), wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "sae_kernels/_build.json" in names and not [name for name in names if name.endswith(".so")]


def test_without_compilers_the_installation_is_pure_python_and_says_why(source, tmp_path):
    for environment, name, reason in (
        ({"CXX": "no-such-compiler", "SAE_SKIP_CUDA": "1"}, "cpu", r"no C\+\+ compiler \(no-such-compiler\)"),
        ({"CXX": "false", "SAE_SKIP_CUDA": "1"}, "cpu", "false .*cpu_kernels.cpp"),
        ({"SAE_SKIP_CPU": "1", "CUDA_HOME": "/nowhere", "SAE_BUILD_CUDA": "1"}, "cuda", "no nvcc"),
    ):
        recorded, log = build(tmp_path, **environment)
        assert re.search(reason, recorded[name]) and re.search(reason, log), recorded
        assert not list(tmp_path.rglob("*.so"))
    # The sources alone, as an installation without compilers has them.
    shutil.copy(tmp_path / "sae_kernels" / "_build.json", source / "sae_kernels" / "_build.json")
    code = """
import torch, sae_kernels
print(sae_kernels.token_noise_eps((3,), seed=1).shape)
try:
    sae_kernels.token_noise_eps((3,), seed=1, impl="cpp")
except ValueError as error:
    print(error)
"""
    output = run(sys.executable, "-c", code, cwd=source)
    assert "torch.Size([3])" in output
    assert "cannot run 'cpp' on cpu: its cpu library is not built: SAE_SKIP_CPU=1 when it was built" in output
    report = run(sys.executable, "-m", "sae_kernels", cwd=source)
    assert re.search(r"C\+\+ cpu +its cpu library is not built: SAE_SKIP_CPU=1", report)
    (source / "sae_kernels" / "_cpu.so").write_bytes(b"not a library")
    report = run(sys.executable, "-m", "sae_kernels", cwd=source)
    (source / "sae_kernels" / "_cpu.so").unlink()
    assert re.search(r"C\+\+ cpu +its cpu library .*_cpu.so does not load: ", report)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.skipif(not CUDA_SOURCES, reason="no CUDA sources")
def test_cuda_compiles_for_hopper_without_spills(tmp_path):
    log = run(
        sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", cwd=ROOT,
        SAE_SKIP_CPU="1", SAE_BUILD_CUDA="1", SAE_CUDA_ARCHS="90a", SAE_BUILD_LOG="1",
    )  # fmt: skip
    assert json.loads((tmp_path / "sae_kernels" / "_build.json").read_text())["cuda"] is None
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(CUDA_SOURCES), log
    assert set(spills) == {("0", "0", "0")}, log
    # It names no symbol that a CPU build of torch lacks, so one wheel serves both.
    code = f"""
import torch, sae_kernels
torch.ops.load_library({str(tmp_path / "sae_kernels" / "_cuda.so")!r})
print(torch._C._dispatch_has_kernel_for_dispatch_key("sae_kernels_native::token_noise_fwd", "CUDA"))
"""
    if _extension.library("cpu") is None and torch.version.cuda is None:
        assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "True"


@pytest.mark.skipif(_extension.library("cpu") is not None, reason=str(_extension.library("cpu")))
def test_on_the_cpu_the_extension_is_cpp():
    """And "cuda" is refused there with the reason, by every op that has code in it."""
    x = torch.zeros(1, 2, 3)
    calls = {
        "token_noise": lambda **impl: sae_kernels.token_noise(x, 1, 1, FrameLayout(2, 1), seed=0, **impl),
        "token_noise_eps": lambda **impl: sae_kernels.token_noise_eps((3,), seed=0, **impl),
        "edm_loss": lambda **impl: sae_kernels.edm_loss(x, x, x[..., 0] + 1, FrameLayout(2, 1), seed=0, **impl),
        "normalize_weights": lambda **impl: sae_kernels.normalize_weights([x], **impl),
        "normalize_weights_": lambda **impl: sae_kernels.normalize_weights_([x.clone()], **impl),
    }
    for op, call in calls.items():
        call(impl="cpp")
        with pytest.raises(ValueError, match=f"impl: {op} cannot run 'cuda' on cpu: it runs on CUDA.*use 'cpp'"):
            call(impl="cuda")
    for op in ("token_noise", "edm_loss"):
        assert report()["ops"][op]["cpu"]["auto"] == "cpp"


def test_libraries_of_earlier_sources_are_not_used(monkeypatch):
    defined = re.findall(r'm\.def\("(\w+)\(', (ROOT / "csrc" / "registration.cpp").read_text())
    assert sorted(_extension.OPS) == sorted(defined)
    if _extension.library("cpu") is None:
        monkeypatch.setattr(_extension, "OPS", (*_extension.OPS, "added_since"))
        assert re.search("_cpu.so is older than its Python code and lacks added_since", str(_extension._load("cpu")))


def test_missing_kernels_are_told_once_when_an_op_first_needs_them(monkeypatch):
    x = torch.ones(2, 3)
    for reason, told in (
        ("its cpu library is not built: there was no C++ compiler", "no C.. compiler; build them with .*isolation"),
        ("its cpu library is not built: SAE_SKIP_CPU=1 when it was built", None),
    ):
        monkeypatch.setitem(_extension._REASONS, "cpu", reason)
        _extension._warn_of_slow_ops.cache_clear()
        for first in (True, False):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                sae_kernels.normalize_weights([x])
            assert len(caught) == (first and told is not None)
            assert all(w.category is RuntimeWarning and re.search(told, str(w.message)) for w in caught)
    _extension._warn_of_slow_ops.cache_clear()


def test_extension_names_devices_it_has_no_code_for():
    assert _extension.why_not(torch.device("mps")) == "it has no code for mps devices"


@pytest.mark.skipif(_extension.library("cpu") is not None, reason=str(_extension.library("cpu")))
@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_lesser_instruction_sets_agree(capability):
    """The words are the same; logarithm and sine may differ in the last places, where no fused multiply-add is."""
    code = """
import torch, sae_kernels
from sae_kernels.testing import assert_within_budget
gold, eager = (sae_kernels.token_noise_eps((50_001,), seed=3, impl="reference").to(d) for d in (torch.float64, torch.float32))
ulp = torch.ldexp(torch.ones_like(eager), torch.frexp(eager).exponent - 24)
got = sae_kernels.token_noise_eps((50_001,), seed=3, impl="cpp")
assert ((got - eager).abs() / ulp).max() <= 4
print("same")
"""
    assert run(sys.executable, "-c", code, cwd=ROOT, SAE_CPU_CAPABILITY=capability).strip() == "same"
