"""`python -m sae_kernels.tune`: measure launch configurations on this GPU and write the fastest as JSON.

The file takes effect where SAE_KERNELS_CONFIGS names it; hand the same file to every rank of a job, so that all of them
round alike. Nothing is ever timed outside this command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from . import _configs
from ._configs import AttentionConfig
from .layout import FrameLayout

# Long enough that scheduling, not launch, is measured; small blocks leave a 128-row tile mostly masked.
LAYOUTS = (FrameLayout(16, 512), FrameLayout(256, 16, noisy_first=True))
HEAD_DIMS = (64, 128, 256)
REPEATS = 20


def candidates(direction: str) -> Iterable[AttentionConfig]:
    if direction == "delta":
        return [AttentionConfig(m, 16, w, 1) for m in (16, 32, 64, 128) for w in (1, 2, 4, 8)]
    grid = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
    return [AttentionConfig(*c) for c in grid if c[0] * c[1] <= 128 * 128]


def fastest(
    configs: Iterable[AttentionConfig], measure: Callable[[AttentionConfig], float]
) -> tuple[AttentionConfig | None, float]:
    """The configuration with the least time; infinite where it does not compile or is wrong. Ties keep the first."""
    best, best_time = None, math.inf
    for config in configs:
        time = measure(config)
        if time < best_time:
            best, best_time = config, time
    return best, best_time


def tune_attention(head_dims: Iterable[int], dtypes: Iterable[torch.dtype], log: Callable[[str], None]) -> list[dict]:
    """Entries for `_configs.load_attention`, one for each head dim, dtype, block size and kernel."""
    major, minor = torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    entries = []
    for head_dim, dtype, layout in itertools.product(head_dims, dtypes, LAYOUTS):
        launchers = _attention_launchers(layout, head_dim, dtype, architecture)
        for direction, (launcher, outputs) in launchers.items():
            block = layout.frames_per_block * layout.tokens_per_frame
            default = _configs.attention_config(architecture, dtype, head_dim, block, direction)
            launcher(default)
            expected = [x.clone() for x in outputs]

            def measure(config: AttentionConfig, launcher=launcher, outputs=outputs, expected=expected) -> float:
                return _time(lambda: launcher(config), outputs, expected)

            before = measure(default)
            best, after = fastest([default, *candidates(direction)], measure)
            if best is None:
                raise RuntimeError(f"no configuration of {direction} runs at head dim {head_dim}, {dtype}")
            key = _configs.attention_key(architecture, dtype, head_dim, block, direction)
            names = ("architecture", "dtype", "width", "small_blocks", "direction")
            entry = dict(zip(names, key, strict=True))
            entries.append(entry | {"config": asdict(best), "milliseconds": after, "default_milliseconds": before})
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
    scale = head_dim**-0.5

    def forward(config):
        kernels.plan_forward(q, k, v, out, lse, layout, scale, False, architecture, config)[0].run()

    def backward(index):
        def run(config):
            kernels.plan_backward(
                grad, q, k, v, out, lse, delta, dq, dk, dv, layout, scale, False, architecture, (config,) * 3
            )[index].run()

        return run

    # In this order each kernel finds what the one before it wrote.
    return {
        "fwd": (forward, (out, lse)),
        "delta": (backward(0), (delta,)),
        "dkdv": (backward(1), (dk, dv)),
        "dq": (backward(2), (dq,)),
    }


def _time(launch: Callable[[], None], outputs, expected) -> float:
    """Median milliseconds of REPEATS launches; infinity if the kernel does not fit or gives another result."""
    from triton.runtime.errors import OutOfResources, PTXASError

    for x in outputs:
        x.fill_(float("nan"))
    try:
        launch()
    except (OutOfResources, PTXASError):
        return math.inf
    for x, y in zip(outputs, expected, strict=True):
        # Another tiling is another order of summation; half a percent of the largest value is no tiling's rounding.
        if not (x.float() - y.float()).abs().max() <= 5e-3 * y.float().abs().max() + 1e-3:
            return math.inf
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[REPEATS // 2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sae_kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("sae_kernels_configs.json"), help="file to write")
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(HEAD_DIMS), help="head dims to tune for")
    parser.add_argument(
        "--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16", "float16"]
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("sae_kernels.tune: measuring needs a CUDA device, and PyTorch sees none here", file=sys.stderr)
        return 1
    import triton

    entries = tune_attention(args.head_dim, [getattr(torch, d) for d in args.dtype], print)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    args.output.write_text(json.dumps(machine | {"frame_attention": entries}, indent=1) + "\n")
    print(f"wrote {args.output}; use it with SAE_KERNELS_CONFIGS={args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
