"""`python -m sae_kernels.tune`: measure launch configurations on this GPU and write the fastest as JSON.

The file takes effect if SAE_KERNELS_CONFIGS names it; give the same file to every rank of a job, so that all of them
round in the same way. Nothing is timed outside this command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch

from . import _configs
from .causal_conv3d import configs as convolution
from .causal_conv3d.configs import ConvConfig
from .frame_attention import configs as attention
from .frame_attention.configs import AttentionConfig
from .layout import FrameLayout

# Long enough to measure scheduling rather than launch; small blocks leave a 128-row tile mostly masked.
LAYOUTS = (FrameLayout(16, 512), FrameLayout(256, 16, noisy_first=True))
HEAD_DIMS = (64, 128, 256)
REPEATS = 20
PATHS = ("pointers", "descriptors")


def candidates(direction: str, architecture: int) -> Iterable[AttentionConfig]:
    if direction == "delta":
        return [AttentionConfig(m, 16, w, 1) for m in (16, 32, 64, 128) for w in (1, 2, 4, 8)]
    descriptors = (False, True) if architecture >= 90 else (False,)
    grid = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4), descriptors)
    return [AttentionConfig(*c) for c in grid if c[0] * c[1] <= 128 * 128]


Config = TypeVar("Config", AttentionConfig, ConvConfig)


def fastest(configs: Iterable[Config], measure: Callable[[Config], float]) -> tuple[Config | None, float]:
    """The fastest configuration and its time, infinite if it does not compile or is wrong. Ties keep the first."""
    best, best_time = None, math.inf
    for config in configs:
        time = measure(config)
        if time < best_time:
            best, best_time = config, time
    return best, best_time


def tune_attention(head_dims: Iterable[int], dtypes: Iterable[torch.dtype], log: Callable[[str], None]) -> list[dict]:
    """Entries of the table "frame_attention", one for each head dim, dtype, block size and kernel."""
    major, minor = torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    entries = []
    for head_dim, dtype, layout in itertools.product(head_dims, dtypes, LAYOUTS):
        launchers = _attention_launchers(layout, head_dim, dtype, architecture)
        for direction, (launcher, outputs) in launchers.items():
            block = layout.frames_per_block * layout.tokens_per_frame
            default = attention.attention_config(architecture, dtype, head_dim, block, direction)
            launcher(default)
            expected = [x.clone() for x in outputs]

            def measure(config: AttentionConfig, launcher=launcher, outputs=outputs, expected=expected) -> float:
                return _time(lambda: launcher(config), outputs, expected)

            before = measure(default)
            best, after = fastest([default, *candidates(direction, architecture)], measure)
            if best is None:
                raise RuntimeError(f"no configuration of {direction} runs at head dim {head_dim}, {dtype}")
            key = attention.attention_key(architecture, dtype, head_dim, block, direction)
            entry = dict(zip(attention.ATTENTION_KEY, key, strict=True))
            entry |= {"config": asdict(best), "milliseconds": after, "default_milliseconds": before}
            if architecture >= 90 and direction != "delta":
                # The shipped tiles by pointers and by descriptors, whichever is the default.
                pair = {path: measure(replace(default, descriptors=path == "descriptors")) for path in PATHS}
                entry |= {f"{path}_milliseconds": time if math.isfinite(time) else None for path, time in pair.items()}
                log(f"{direction} D={head_dim} block={block}: " + ", ".join(f"{k} {v:.3f} ms" for k, v in pair.items()))
            entries.append(entry)
            log(f"{direction} D={head_dim} {entry['dtype']} block={block}: {before:.3f} -> {after:.3f} ms with {best}")
    return entries


def _attention_launchers(layout: FrameLayout, head_dim: int, dtype: torch.dtype, architecture: int) -> dict:
    """direction: (function of a configuration that launches one kernel, what it writes)."""
    from .frame_attention import triton as kernels

    shape = (2, 16, layout.sequence_length, head_dim)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(4))
    out, dq, dk, dv = (torch.empty_like(q) for _ in range(4))
    lse = torch.empty(shape[:3], device="cuda")
    delta = torch.empty_like(lse)
    tensors = kernels.Gradients(grad, q, k, v, out, lse, delta, dq, dk, dv)
    scale = head_dim**-0.5

    def forward(config):
        kernels.plan_forward(q, k, v, out, lse, layout, scale, False, architecture, config)[0].run()

    def backward(index):
        def run(config):
            kernels.plan_backward(tensors, layout, scale, False, architecture, (config,) * 3)[index].run()

        return run

    # In this order, because each kernel reads what the one before it wrote.
    return {
        "fwd": (forward, (out, lse)),
        "delta": (backward(0), (delta,)),
        "dkdv": (backward(1), (dk, dv)),
        "dq": (backward(2), (dq,)),
    }


def _time(launch: Callable[[], None], outputs, expected) -> float:
    """Median milliseconds of REPEATS launches; infinity if the kernel does not fit or gives another result."""
    for x in outputs:
        x.fill_(float("nan"))
    return _median(launch) if _fits(launch) and _agree(outputs, expected) else math.inf


def _fits(launch: Callable[[], None]) -> bool:
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        launch()
    except (OutOfResources, PTXASError):
        return False
    return True


def _agree(outputs, expected) -> bool:
    """Whether a difference is rounding: another order of summation changes less than half a percent of the largest."""
    pairs = zip(outputs, expected, strict=True)
    return all(bool((x.float() - y.float()).abs().max() <= 5e-3 * y.float().abs().max() + 1e-3) for x, y in pairs)


def _median(launch: Callable[[], None]) -> float:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[REPEATS // 2]


# (batch, Y = X, channels in and out) at 16 frames: one for each class of maps and widths of the networks' levels.
CONVOLUTIONS = ((8, 32, 64), (2, 16, 256), (2, 8, 256), (2, 4, 512))


def conv_candidates(default: ConvConfig, direction: str, architecture: int) -> list[ConvConfig]:
    """The default first. Tiles that exceed the shared memory are left out, because they would fail to compile."""
    if direction == "streams":
        return [default, *(ConvConfig(m, default.block_n, 16, w, 1) for m in (8, 16, 32, 64) for w in (2, 4, 8))]
    limit = _configs.SHARED_MEMORY.get(architecture, 101_376)
    boxes = (False, True) if architecture >= 90 else (False,)
    grid = itertools.product(
        (64, 128), (16, 32, 64, 128, 256), (16, 32, 64, 128), ((4, 3), (4, 4), (8, 3), (8, 4)), boxes
    )
    found = [default]
    for m, n, k, (warps, stages), box in grid:
        useful = n <= 2 * default.block_n and 2 * n >= default.block_n and k <= 2 * default.block_k <= 4 * k
        if useful and (m + n) * k * 2 * stages <= limit and m * n <= 128 * 128:
            found.append(ConvConfig(m, n, k, warps, stages, box, default.parts))
    return found


def tune_convolution(
    shapes: Iterable[tuple[int, int, int]],
    dtypes: Iterable[torch.dtype],
    log: Callable[[str], None],
    *,
    architecture: int,
    device: str = "cuda",
    median: Callable[[Callable[[], None]], float] = _median,
    frames: int = 16,
) -> tuple[list[dict], list[dict]]:
    """(entries of the table "causal_conv3d", those of "causal_conv3d_slower"), for every shape, dtype and kernel."""
    from .causal_conv3d import triton as kernels

    entries, slower = [], []
    layout = FrameLayout(frames, 1)
    for (B, size, C), dtype in itertools.product(shapes, dtypes):
        generator = torch.Generator(device).manual_seed(0)

        def video(channels: int, depth: int, B=B, size=size, dtype=dtype, generator=generator) -> torch.Tensor:
            values = torch.randn((B, depth, size, size, channels), generator=generator, device=device)
            return values.to(dtype).permute(0, 4, 1, 2, 3)

        F = layout.total_frames
        x, grad, weight = video(C, F), video(C, F), video(C, 3)[:1].new_empty(C, C, 3, 3, 3)
        weight.copy_(torch.randn(weight.shape, generator=generator, device=device) / (27 * C) ** 0.5)
        scale = torch.rand((B, F), generator=generator, device=device).to(dtype)
        key = convolution.conv_key(architecture, dtype, C, C, size * size)
        best: dict[str, ConvConfig] = {}
        for direction in convolution.CONV_DIRECTIONS:
            build = _conv_launches(kernels, direction, x, grad, weight, scale, layout, architecture)
            default = convolution.conv_config(architecture, dtype, C, C, size * size, direction)
            launches, read = build(default)
            _run(launches)
            expected = [t.clone() for t in read()]

            def measure(config: ConvConfig, build=build, expected=expected) -> float:
                launches, read = build(config)
                fits = _fits(lambda: _run(launches))
                return median(lambda: _run(launches)) if fits and _agree(read(), expected) else math.inf

            before = measure(default)
            config, after = fastest(conv_candidates(default, direction, architecture), measure)
            if config is not None and default.parts > 0:
                several = [replace(config, parts=parts) for parts in (config.parts, 0, 1, 2, 4, 8)]
                config, after = fastest(several, measure)
            if config is None:
                raise RuntimeError(f"no configuration of {direction} runs at {C} channels, {size} x {size}, {dtype}")
            best[direction] = config
            entry = dict(zip(convolution.CONV_KEY, key, strict=True)) | {"direction": direction}
            entries.append(entry | {"config": asdict(config), "milliseconds": after, "default_milliseconds": before})
            log(f"{direction} C={C} {size}x{size} {key[1]}: {before:.3f} -> {after:.3f} ms with {config}")

        ratio = _composed_over_triton(x, grad, weight, layout, architecture, best, median)
        log(f"C={C} {size}x{size} {key[1]}: forward and backward {ratio:.2f} times the speed of the library route")
        if ratio < 1:
            slower.append(dict(zip(convolution.CONV_KEY, key, strict=True)) | {"composed_over_triton": ratio})
    return entries, slower


def _composed_over_triton(x, grad, weight, layout, architecture, best, median) -> float:
    """Time of the library route over that of the kernels, forward and backward together."""
    from .causal_conv3d import composed
    from .causal_conv3d import triton as kernels

    mask = [True, True, False, False, False]

    def ours() -> None:
        _run(
            kernels.plan_forward(x, weight, None, None, None, 1.0, layout, architecture, best["fwd"], keep_past=False)[
                0
            ]
        )
        _run(kernels.plan_backward(grad, x, weight, None, None, None, None, 1.0, layout, mask, architecture, best)[0])

    def library() -> None:
        composed.forward(x, weight, None, None, None, 1.0, layout, keep_past=False)
        composed.backward(grad, x, weight, None, None, None, None, 1.0, layout, mask)

    return median(library) / median(ours)


def _conv_launches(kernels, direction: str, x, grad, weight, scale, layout: FrameLayout, architecture: int) -> Callable:
    """A function of a configuration: (the launches of one direction, a function that reads what they wrote)."""

    def forward(config):
        launches, out, _ = kernels.plan_forward(
            x, weight, None, None, None, 1.0, layout, architecture, config, keep_past=False
        )
        return launches, lambda: [out]

    def backward(config):
        scales = (scale, scale) if direction in ("dgrad_dot", "streams") else (None, None)
        mask = [
            direction in ("dgrad", "dgrad_dot", "streams"),
            direction == "wgrad",
            False,
            scales[1] is not None,
            False,
        ]
        name = "dgrad" if direction == "dgrad_dot" else direction
        launches, grad_x, parts, _, dot, _ = kernels.plan_backward(
            grad, x, weight, *scales, None, None, 1.0, layout, mask, architecture, {name: config}
        )
        if direction == "streams":
            launches = [launch for launch in launches if launch.kernel is kernels.plan.causal_conv3d_streams_kernel]
            return launches, lambda: [launches[0].args["sum_ptr"]]
        if direction == "wgrad":
            return launches, lambda: [part.sum(0) for part in parts]
        return launches, lambda: [grad_x, *([] if dot is None else [dot.sum((0, 3))])]

    return forward if direction == "fwd" else backward


def _run(launches) -> None:
    for launch in launches:
        launch.run()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sae_kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("sae_kernels_configs.json"), help="file to write")
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(HEAD_DIMS), help="head dims to tune for")
    parser.add_argument(
        "--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16", "float16"]
    )
    ops = ("frame_attention", "causal_conv3d")
    parser.add_argument("--op", nargs="+", choices=ops, default=list(ops), help="ops to tune")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("sae_kernels.tune: measuring needs a CUDA device, and PyTorch sees none here", file=sys.stderr)
        return 1
    import triton

    dtypes = [getattr(torch, d) for d in args.dtype]
    tables: dict[str, list[dict]] = {}
    if "frame_attention" in args.op:
        tables["frame_attention"] = tune_attention(args.head_dim, dtypes, print)
    if "causal_conv3d" in args.op:
        major, minor = torch.cuda.get_device_capability()
        tables["causal_conv3d"], tables["causal_conv3d_slower"] = tune_convolution(
            CONVOLUTIONS, dtypes, print, architecture=10 * major + minor
        )
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    args.output.write_text(json.dumps(machine | tables, indent=1) + "\n")
    print(f"wrote {args.output}; use it with SAE_KERNELS_CONFIGS={args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
