"""Attention and convolution at your own shapes, compared with plain PyTorch; needs only sae_kernels.

Times are medians of repeated calls with the same inputs. `python -m benchmarks` measures with more care: interleaved
contenders, a cold cache, the machine's own limits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sae_kernels import FrameLayout, causal_conv3d, frame_attention


def seconds(call: Callable[[], torch.Tensor], inputs: list[torch.Tensor], rounds: int, backward: bool) -> float:
    """Median time of a call, or of a call and its backward pass."""
    times = []
    for _ in range(rounds + 1):
        for x in inputs:
            x.grad = None
        synchronize(inputs[0])
        begun = time.perf_counter()
        out = call()
        if backward:
            out.sum().backward()
        synchronize(inputs[0])
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])  # the first one compiles and warms up


def synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def streams_apart(x: torch.Tensor, weight: torch.Tensor, layout: FrameLayout) -> torch.Tensor:
    """The same convolution in PyTorch: the clean past of every stream, then that stream's own last tap."""
    clean, kt = layout.split(x, dim=2)[0], weight.shape[2]
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    past = F.pad(clean, (0, 0, 0, 0, kt - 1, 0))[:, :, :-1]
    shared = F.conv3d(past, weight[:, :, :-1], padding=padding)
    last = F.conv3d(x, weight[:, :, -1:], padding=padding)
    return last + torch.cat([shared] * layout.streams, dim=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16, help="T, frames of a clip")
    parser.add_argument("--grid", type=int, nargs=2, default=(8, 8), help="Y X; a frame has Y * X tokens")
    parser.add_argument("--noisy-copies", type=int, default=1, help="K, noisy copies that share the clean one")
    parser.add_argument("--frames-per-block", type=int, default=1)
    parser.add_argument("--window", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--forward-only", action="store_true")
    o = parser.parse_args()
    Y, X = o.grid
    layout = FrameLayout(o.frames, Y * X, o.frames_per_block, o.noisy_copies, window=o.window)
    options = {"device": o.device, "dtype": getattr(torch, o.dtype), "requires_grad": not o.forward_only}
    q, k, v = (torch.randn(o.batch, o.heads, layout.sequence_length, o.head_dim, **options) for _ in range(3))
    x = torch.randn(o.batch, o.channels, layout.total_frames, Y, X, device=o.device, dtype=getattr(torch, o.dtype))
    x = x.to(memory_format=torch.channels_last_3d).requires_grad_(not o.forward_only)
    weight = torch.randn(o.channels, o.channels, 3, 3, 3, **options)
    mask = layout.dense_mask(device=q.device)
    print(f"{layout}\nS = {layout.sequence_length}, {layout.attended_pairs / mask.numel():.0%} of all pairs are seen")
    contenders = {
        "frame_attention": ([q, k, v], lambda: frame_attention(q, k, v, layout)),
        "scaled_dot_product_attention": ([q, k, v], lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)),
        "causal_conv3d": ([x, weight], lambda: causal_conv3d(x, weight, layout)),
        "conv3d, past and present apart": ([x, weight], lambda: streams_apart(x, weight, layout)),
    }
    if o.frames_per_block > 1:  # noisy frames of a block then see their own copy, which this does not compute
        del contenders["conv3d, past and present apart"]
    for name, (inputs, call) in contenders.items():
        print(f"{name:<31} {1e3 * seconds(call, inputs, o.rounds, not o.forward_only):9.3f} ms")


if __name__ == "__main__":
    main()
