"""The device that --device names."""

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
