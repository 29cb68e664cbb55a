"""The device that --device names, and the precision that --precision names."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """The device of that name, or for "auto" CUDA where available; ValueError for a device that does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: must name a device such as cpu or cuda:0, got {name!r} ({reason})") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: must exist, got {name!r} on a machine with {torch.cuda.device_count()} CUDA devices")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """What "auto" stands for: bf16 on a device that multiplies in it, CUDA from 8.0, CPUs with AVX-512-BF16 or AMX.

    Elsewhere it is fp32, as bf16 would be computed in fp32 with a cast before and after.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type != "cpu":
        return "fp32"
    # names that torch keeps to itself: without them the answer is no
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if any(check is not None and check() for check in checks) else "fp32"
