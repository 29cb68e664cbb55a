"""The C++ extension: loads the libraries that setup.py built, and says why one is missing.

Its ops, `torch.ops.sae_kernels_native.*`, write into tensors that are passed to them; each op's `cpp.py` calls them.
They are registered here with fakes, so that a trace does not run them.
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import torch

from . import _library

NAMESPACE = "sae_kernels_native"
# Those in csrc/registration.cpp; a library built from earlier sources lacks some.
OPS = (
    "token_noise_fwd", "token_noise_bwd", "token_noise_eps", "edm_loss", "normalize_weights", "normalize_weights_bwd",
    "frame_attention_fwd", "frame_attention_bwd", "causal_conv3d_fwd", "causal_conv3d_bwd", "mp_silu", "mp_sum",
    "mp_sum_bwd", "mp_cat", "modulated_silu", "modulated_silu_bwd", "pixel_norm", "pixel_norm_bwd", "qk_prepare_fwd",
    "qk_prepare_bwd",
)  # fmt: skip
_HERE = Path(__file__).parent


def _load(name: str) -> str | None:
    """Load `_<name>.so`; returns the reason if it cannot be used, else None."""
    library = _HERE / f"_{name}.so"
    if not library.exists():
        try:
            recorded = json.loads((_HERE / "_build.json").read_text()).get(name)
        except (OSError, ValueError):
            recorded = None
        return f"its {name} library is not built: {recorded or 'run `pip install --no-build-isolation .`'}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"its {name} library {library} does not load: {error}"
    missing = [op for op in OPS if f"{NAMESPACE}::{op}" not in torch._C._dispatch_get_all_op_names()]
    if missing:
        return f"its {name} library {library} is older than its Python code and lacks {', '.join(missing)}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if _REASONS["cpu"] is not None:
        return f"it needs the CPU library, and {_REASONS['cpu']}"
    return _load("cuda")


def _register_fakes() -> None:
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith(f"{NAMESPACE}::"):
            torch.library.register_fake(name, lambda *args, **kwargs: None)


_REASONS: dict[str, str | None] = {"cpu": _load("cpu")}
_REASONS["cuda"] = _load_cuda()
if _REASONS["cpu"] is None:
    _register_fakes()


def library(name: str) -> str | None:
    """Why the "cpu" or "cuda" library cannot be used; None if it is loaded."""
    return _REASONS[name]


@_library.constant_in_graphs
def why_not(device: torch.device) -> str | None:
    """Why the extension cannot run on this device; None if it can."""
    if device.type not in _REASONS:
        return f"it has no code for {device.type} devices"
    reason = _REASONS[device.type]
    if device.type == "cpu" and reason is not None:
        _warn_of_slow_ops(reason)
    if reason is None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or newer, this device has {major}.{minor}"
    return reason


@functools.cache
def _warn_of_slow_ops(reason: str) -> None:
    """Warn once, when an op is first used on the CPU, because pip does not show what a build could not do."""
    if "SAE_SKIP_CPU=1" not in reason:  # unless the user asked for it
        message = f"sae_kernels: ops on the CPU run without their C++ kernels, which is slower: {reason}"
        hint = "" if "--no-build-isolation" in reason else "; build them with `pip install --no-build-isolation .`"
        warnings.warn(message + hint, RuntimeWarning, stacklevel=2)


def offer(available: list[str], unavailable: dict[str, str], device: torch.device, cannot: str | None = None) -> None:
    """Add the extension to an op's implementations: first, as "cpp" on the CPU or "cuda" on CUDA, or the reason.

    `cannot`: why it does not support the op's arguments, if it does not.
    """
    name, other = ("cpp", "cuda") if device.type == "cpu" else ("cuda", "cpp")
    unavailable[other] = f"it runs on {'CUDA devices' if other == 'cuda' else 'the CPU'}; here use {name!r}"
    reason = why_not(device) or cannot
    if reason is None:
        available.insert(0, name)
    else:
        unavailable[name] = reason


def offer_on_cpu(
    available: list[str], unavailable: dict[str, str], device: torch.device, cannot: str | None = None
) -> None:
    """`offer` for an op whose C++ is for the CPU alone."""
    if device.type == "cpu":
        offer(available, unavailable, device, cannot)
    else:
        unavailable["cpp"] = "it runs on the CPU; here use triton or composed"
    unavailable["cuda"] = "there is no CUDA C++ kernel for this op; use triton"
