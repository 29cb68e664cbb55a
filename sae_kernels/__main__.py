"""Environment report: `python -m sae_kernels` prints what runs here, and why the rest does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys

import torch

from . import __version__, _extension

OPS = ("frame_attention", "causal_conv3d", "token_noise", "edm_loss", "activations", "weight_norm", "qk_prepare")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    return found + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def describe_device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB"


def report() -> dict:
    """Versions, devices, and for each op and device what `impl="auto"` uses and why not the others."""
    ops: dict[str, dict] = {}
    for op in OPS:
        module = importlib.import_module(f".{op}.ops", __package__)
        ops[op] = {}
        for device in devices():
            available, why_not = module.implementations(device)
            ops[op][str(device)] = {"auto": available[0], "available": list(available), "why_not": dict(why_not)}
    return {
        "versions": {
            "python": platform.python_version(),
            "sae-kernels": __version__,
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "numpy": version_of("numpy"),
            "cuda": torch.version.cuda or "none",
            "cudnn": str(torch.backends.cudnn.version() or "none"),
        },
        "platform": platform.platform(),
        "extension": {name: _extension.library(name) or "loaded" for name in ("cpu", "cuda")},
        "devices": {str(device): describe_device(device) for device in devices()},
        "ops": ops,
    }


def format_report(result: dict) -> str:
    lines = [f"{name:<12} {value}" for name, value in result["versions"].items()]
    lines += [f"{'platform':<12} {result['platform']}"]
    lines += [f"{name:<12} {value}" for name, value in result["devices"].items()]
    lines += [f"{'C++ ' + name:<12} {state}" for name, state in result["extension"].items()]
    for op, by_device in result["ops"].items():
        for device, entry in by_device.items():
            lines.append(
                f"\n{op} on {device}: {entry['auto']} (also {', '.join(entry['available'][1:]) or 'nothing else'})"
            )
            lines += [f"    not {name}: {reason}" for name, reason in entry["why_not"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_report(report()))
    sys.exit(0)
