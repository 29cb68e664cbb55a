"""How many operations a training step takes and how many bytes they move, ours against plain PyTorch. Nothing is timed.

A step: weights normalised, noise, network, loss, backward; without optimizer. Plain PyTorch is the same network on each
op's specification, with convolutions over separate past taps, dense-mask attention and `torch.randn_like`.

CPU: leaf operations that run, as torch.profiler reports them, and the bytes of each: those of its tensor arguments and
results, each as large as its memory (a broadcast counts once), as a dispatch mode sees them. Views and allocations are
left out of both.

CUDA: no GPU is needed. The step runs on meta tensors; a registered op is counted by its launch plan: kernels, and the
bytes of each one's different tensors; what it or the rest leaves to PyTorch is a launch for each operation. What a
kernel reads twice, out of cache or not, counts once, for ours and for PyTorch's. fp32 everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_kernels import _checks, _extension, _launch, _library
from sae_kernels.weight_norm import reference

from . import convolution, naive, report, train_step

BEGIN, END = "<!-- traffic:begin -->", "<!-- traffic:end -->"
# Operations that move nothing: views, allocations, and what only touches numbers on the host.
FREE = {
    "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "select", "slice", "narrow", "split",
    "split_with_sizes", "unbind", "squeeze", "unsqueeze", "unsqueeze_", "alias", "detach", "detach_", "as_strided",
    "unfold", "flatten", "unflatten", "diagonal", "_reshape_alias", "chunk", "view_as", "expand_as", "empty",
    "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "lift", "lift_fresh", "item",
    "_local_scalar_dense", "to", "resolve_conj", "as_strided_",
}  # fmt: skip
# Weights that one launch of csrc/weight_norm.cu takes: its kMost.
WEIGHTS_OF_A_LAUNCH = 256


class Count(TorchDispatchMode):
    """Leaf operations below autograd, each (name, launches, bytes), in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, int]] = []
        self.inside: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        implementation = _library.implementations.get(func)
        if implementation is not None:
            # The op's implementation, with this mode on again.
            self.inside.append(func._schema.name)
            with self, _launch.planning(90) as launches:
                out = implementation(*args, **kwargs)
            for launch in launches:
                self._add(launch.kernel.__name__, 1, footprint(launch.args.values()))
            self.inside.pop()
            return out
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE:
            read = [
                value
                for argument, value in zip(func._schema.arguments, args)
                if not (argument.alias_info and argument.alias_info.is_write and argument.kwarg_only)
            ]
            written = tree_leaves(out)
            if func.namespace == _extension.NAMESPACE:
                read = list(args) + list(kwargs.values())
            launches = 1
            if "::normalize_weights" in name:
                launches = math.ceil(len(args[0]) / WEIGHTS_OF_A_LAUNCH)
                in_place = not name.endswith("_bwd") and args[4]
                written = list(args[0]) if in_place else []  # else what it writes to is among its arguments
            moved = footprint(tree_leaves(read)) + footprint(written)
            if moved:
                self._add(name, launches, moved)
        return out

    def _add(self, name: str, launches: int, moved: int) -> None:
        self.found.append((f"{self.inside[-1]}/{name}" if self.inside else name, launches, moved))


@functools.cache
def is_composite(func: torch._ops.OpOverload) -> bool:
    """An operation that is nothing but others."""
    has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    return has("CompositeImplicitAutograd") and not has("CPU") and not has("CompositeExplicitAutograd")


def footprint(values: Any) -> int:
    """Bytes of the different tensors among values, dimensions of stride 0 once; host numbers are none."""
    seen: dict[tuple, int] = {}
    for value in values:
        value = getattr(value, "base", value)
        if isinstance(value, torch.Tensor) and value.ndim:
            elements = math.prod(n for n, stride in zip(value.shape, value.stride()) if stride)
            key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride())
            seen[key] = elements * value.element_size()
    return sum(seen.values())


@contextlib.contextmanager
def choosing(choose: Callable[[Sequence[str]], str]) -> Iterator[None]:
    """Inside, every op takes the implementation that `choose` picks of those a GPU of the newest kind would have."""

    def pick(op, impl, device, available, why_not=None):
        return choose(available)

    with (
        mock.patch.object(_checks, "choose_implementation", pick),
        mock.patch.object(_launch, "why_not", return_value=None),
        mock.patch.object(_extension, "why_not", return_value=None),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),  # raises for meta tensors
    ):
        yield


def fastest(available: Sequence[str]) -> str:
    return next(impl for impl in ("cuda", "cpp", "triton", "composed", "reference") if impl in available)


def plain(available: Sequence[str]) -> str:
    return "reference" if "reference" in available else "composed"


def plain_loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The mean loss as written down: noise, network, preconditioning and weight in separate operations."""
    x0, sigmas, K = batch["x0"], batch["sigmas"], batch["K"]
    T, d = x0.shape[1], model.config.sigma_data
    streams = torch.cat([x0] * (1 + K), dim=1)
    x = streams + sigmas[:, :, None, None, None] * torch.randn_like(streams)
    error = model(x, sigmas, batch["actions"], noisy_copies=K)[:, T:] - streams[:, T:]
    s = sigmas[:, T:]
    return ((s**2 + d**2) / (s * d) ** 2 * error.square().mean(dim=(2, 3, 4))).mean()


def two_passes(x, weight, layout, *, past_scale=None, last_scale=None, history=None, pad_value=0.0, impl="auto"):
    return convolution.two_passes(x, weight, layout, past_scale, last_scale, history, pad_value)


def dense_attention(q, k, v, layout, *, impl="auto"):
    """`naive.dense_attention` as it runs on CUDA: mask to bias, then PyTorch's memory-efficient kernel."""
    if q.device.type != "meta":
        return naive.dense_attention(q, k, v, layout)
    bias = torch.where(naive._dense_mask(layout, q.device), 0.0, -math.inf)
    bias = bias.expand(*q.shape[:2], *bias.shape)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, compute_log_sumexp=True)[0]


def steps(model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, Callable[[], None]]:
    """The two steps: forward and backward of one batch, weights normalised before."""

    def ours() -> None:
        model.normalize_weights_()
        train_step.loss_of(model, batch, "fp32").backward()

    def eager() -> None:
        with torch.no_grad():
            for module in model.modules():
                for w in module.raw_weights() if hasattr(module, "raw_weights") else ():
                    w.copy_(reference.normalize_weight(w, math.sqrt(w[0].numel())))
        with naive.swapped(two_passes, dense_attention):
            plain_loss(model, batch).backward()

    return {"plain PyTorch": eager, "sae_kernels": ours}


def count(shape: Mapping[str, Any], device: str) -> dict[str, dict[str, Any]]:
    """{"plain PyTorch" | "sae_kernels": {"launches", "bytes", "profiled", "ops": {name: [launches, bytes]}}}."""
    config = train_step.config_of(shape)
    found = {}
    for name in ("plain PyTorch", "sae_kernels"):
        naive.forget()
        where = "meta" if device == "cuda" else "cpu"
        model = train_step.network(config, "cpu").to(where)
        batch = train_step.clips(config, shape["B"], shape["T"], shape["K"], where, 0)
        run = steps(model, batch)[name]
        mode = Count()
        planned = choosing(plain if name == "plain PyTorch" else fastest)
        with planned if device == "cuda" or name == "plain PyTorch" else contextlib.nullcontext():
            with torch.no_grad(), naive.swapped(two_passes, dense_attention):
                plain_loss(model, batch)  # makes the mask that is kept
            with mode:
                run()
            model.zero_grad(set_to_none=True)
            profiled = _profiled(run) if device == "cpu" else None
        ops: dict[str, list[int]] = {}
        for op, launches, moved in mode.found:
            entry = ops.setdefault(op, [0, 0])
            entry[0] += launches
            entry[1] += moved
        found[name] = {
            "launches": sum(launches for launches, _ in ops.values()),
            "bytes": sum(moved for _, moved in ops.values()),
            "profiled": profiled,
            "ops": dict(sorted(ops.items(), key=lambda item: -item[1][1])),
        }
    return found


def _profiled(run: Callable[[], None]) -> int:
    """Leaf operations of PyTorch, and those of the extension, that torch.profiler reports."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    leaves = [e.name for e in profiler.events() if not e.cpu_children]
    ours = [e.name for e in profiler.events() if e.name.startswith(f"{_extension.NAMESPACE}::")]
    return len(ours) + sum(name.startswith("aten::") and name.split("::")[1] not in FREE for name in leaves)


def table(result: Mapping[str, Any]) -> str:
    """Markdown of a result file."""
    shape = result["shape"]
    lines = [
        f"One training step of the {shape['preset']} preset, {shape['B']} x {shape['T']} frames, K = {shape['K']}, "
        "fp32, without optimizer: counted, not timed (`python -m benchmarks traffic`; how: benchmarks/traffic.py). "
        "In fp32 our ops are one C++ call each on the CPU, whose workspace inside is not counted, and one or a few "
        "kernels on CUDA.",
        "",
        "| | plain PyTorch | sae_kernels | fewer |",
        "|---|---|---|---|",
    ]
    labels = {"cpu": "CPU, operations that run", "cuda": "CUDA, kernel launches by the plans"}
    for device, by_name in result["counts"].items():
        before, after = by_name["plain PyTorch"], by_name["sae_kernels"]
        rows = [(labels[device], before["launches"], after["launches"], "{:,}")]
        if device == "cpu":
            rows.append(("CPU, leaf operations in torch.profiler", before["profiled"], after["profiled"], "{:,}"))
        rows.append((f"{labels[device].split(',')[0]}, GB read and written", before["bytes"], after["bytes"], "{:.2f}"))
        for label, old, new, form in rows:
            if form != "{:,}":
                lines.append(f"| {label} | {form.format(old / 1e9)} | {form.format(new / 1e9)} | {old / new:.2f}x |")
            else:
                lines.append(f"| {label} | {form.format(old)} | {form.format(new)} | {old / new:.2f}x |")
    return "\n".join(lines)


def main(argv: Sequence[str], root: Path) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks traffic", description="Launches and bytes of a training step, counted."
    )
    parser.add_argument("--preset", default="lunar-lander")
    for name, default in (("B", 1), ("T", 8), ("K", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, default=root / "benchmarks" / "results" / "traffic.json")
    parser.add_argument(
        "--page", type=Path, help="file to write the table into, between markers as in docs/benchmarks.md"
    )
    options = parser.parse_args(argv)
    shape = {key: getattr(options, key) for key in ("preset", "B", "T", "K")}
    counts = {device: count(shape, device) for device in ("cpu", "cuda")}
    result = {"schema": 1, "kind": "traffic", "torch": torch.__version__, "shape": shape, "counts": counts}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.page is not None:
        report.write_between(options.page, table(result), BEGIN, END)
    print(table(result))
    return 0
