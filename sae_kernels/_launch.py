"""A Triton launch as data: the launcher runs it; the compile gate compiles it for a GPU that is not present."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import _library

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Searched for once, because a search took half the time of a small call.
INSTALLED = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Launch:
    """One kernel, its grid, its arguments by name (constexprs included) and its compile options."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        # Triton 3.10 turns contraction to fma off by default; set here, so that releases agree in their results.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the current device and its current stream."""
        if INTERPRETED:
            from . import _interpreter

            _interpreter.correct()
        self.kernel[self.grid](**self.args, **self.options)


_planned: tuple[int, list[Launch]] | None = None


@contextlib.contextmanager
def planning(architecture: int) -> Iterator[list[Launch]]:
    """Collect launches on meta tensors instead of running them, for a GPU of compute capability architecture / 10."""
    global _planned
    outside, _planned = _planned, (architecture, [])
    try:
        yield _planned[1]
    finally:
        _planned = outside


def architecture(device: torch.device) -> int:
    """Compute capability times ten; 0 for the interpreter."""
    if device.type == "meta" and _planned is not None:
        return _planned[0]
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def run(launches: list[Launch], device: torch.device) -> None:
    """Run the launches in order on `device`."""
    if device.type == "meta" and _planned is not None:
        _planned[1].extend(launches)
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            for launch in launches:
                launch.run()
        return
    if not INTERPRETED:
        raise ValueError(f"impl: 'triton' needs a CUDA tensor or TRITON_INTERPRET=1, got a tensor on {device}")
    for launch in launches:
        launch.run()


_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """(types, constexprs, attributes) as `triton.compiler.ASTSource` takes them.

    Tensors are taken to be 16-byte aligned, as from the caching allocator; tensor descriptors always are. An integer
    must have a type annotation and be exempt from specialisation, so that its value can neither recompile nor change a
    kernel.
    """
    types, constants, attributes = {}, {}, {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.args[param.name]
        if param.is_constexpr:
            types[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            types[param.name] = "*" + _TYPE_NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):
            types[param.name] = f"tensordesc<{_TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            types[param.name] = "fp32"
        else:
            assert param.do_not_specialize and param.annotation_type, f"{launch.kernel.__name__}: {param.name}"
            types[param.name] = param.annotation_type
    return types, constants, attributes


@_library.constant_in_graphs
def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device; None if they can."""
    if not INSTALLED:
        return "the package triton is not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or newer, this device has {major}.{minor}"
    elif os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "it needs a CUDA device, or TRITON_INTERPRET=1 set before Python starts, to be interpreted on the CPU"
    return None
