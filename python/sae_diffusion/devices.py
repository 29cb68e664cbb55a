"""The device that --device names."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: must name a device such as cpu or cuda:0, got {name!r} ({str(error).splitlines()[0]})") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} is not available; this machine has {torch.cuda.device_count()} CUDA devices")
    return device
