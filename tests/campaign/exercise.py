"""Calls every C++ op of the CPU library, for a sanitizer to watch: sizes around chunks and vectors, strides, dtypes.

Fails where the library has an op that is not called here.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import torch

import sae_kernels
from sae_kernels import FrameLayout, _extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def native_ops() -> list[str]:
    """The ops that the CPU library registers."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    ops = {op for namespace, _, op in names if namespace == _extension.NAMESPACE}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return sorted(op for op in ops if has(f"{_extension.NAMESPACE}::{op}", "CPU"))


def watch(ops: list[str]) -> Counter[str]:
    """How often each op has been called."""
    called: Counter[str] = Counter()
    namespace = getattr(torch.ops, _extension.NAMESPACE)

    def noting(op: str, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            called[op] += 1
            return function(*arguments, **options)

        return call

    for op in ops:
        setattr(namespace, op, noting(op, getattr(namespace, op)))
    return called


def variants(x: torch.Tensor) -> list[torch.Tensor]:
    """x as it is, with its last dimension strided, turned round in memory, and at the end of a larger block."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., 1::2] = x
    turned = x.mT.contiguous().mT
    block = torch.cat([x.new_zeros(3), x.flatten()])
    return [x, wide[..., 1::2], turned, block[3:].view(x.shape)]


def differentiate(call, *inputs: torch.Tensor) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = call(*leaves)
    outs = outs if isinstance(outs, (tuple, list)) else [outs]
    sum(out.double().sum() for out in outs if out.requires_grad).backward()


def token_noise() -> None:
    for count in (1, 3, 15, 1023, 1025, 4 * 1024 + 1):
        for dtype in DTYPES:
            sae_kernels.token_noise_eps((count,), seed=3, offset=2**40, dtype=dtype, impl="cpp")
    sae_kernels.token_noise_eps((0,), seed=3, impl="cpp")
    for dtype, shape, noisy in itertools.product(DTYPES, ((2, 3, 1, 1), (1, 2, 3, 347), (2, 1, 33, 33)), (0, 1, 2)):
        layout = FrameLayout(shape[1], 1, noisy_copies=noisy)
        whole = (shape[0], layout.total_frames, *shape[2:])
        scales = [torch.rand(whole[:2]), torch.rand(whole), torch.rand(1, 1, 1, 1).expand(whole)]
        for x, scale in zip(variants(torch.randn(shape).to(dtype)), [*scales, scales[0]], strict=True):
            for returns in (False, True):
                options = {"seed": 1, "offset": 7, "return_noise": returns, "impl": "cpp"}
                differentiate(lambda *a: sae_kernels.token_noise(*a, layout, **options), x, scale, scale * 2)  # noqa: B023


def edm_loss() -> None:
    for dtype, shape, noisy in itertools.product(DTYPES, ((2, 3, 1, 1), (1, 2, 3, 347), (2, 1, 33, 33)), (1, 2)):
        layout = FrameLayout(shape[1], 1, noisy_copies=noisy)
        sigma = torch.rand(shape[0], noisy * shape[1]) + 0.1
        raws = variants(torch.randn(shape[0], noisy * shape[1], *shape[2:]).to(dtype))
        for raw, x0 in zip(raws, variants(torch.randn(shape).to(dtype)), strict=True):
            differentiate(
                lambda r: sae_kernels.edm_loss(r, x0, sigma, layout, seed=1, impl="cpp"),  # noqa: B023
                raw,
            )


def normalize_weights() -> None:
    shapes = [(3, 1), (1, 7), (5, 63), (2, 64, 3, 3), (3, 4097), (17, 1023), (64, 12, 3, 3, 3), (2, 5000)]
    for dtype in DTYPES:
        weights = [torch.randn(shape) for shape in shapes]
        copies = [torch.empty(shape, dtype=dtype) for shape in shapes]
        gains = [0.5 + i for i in range(len(shapes))]
        sae_kernels.normalize_weights_(weights, impl="cpp")
        sae_kernels.normalize_weights_(weights, copies=copies, gains=gains, impl="cpp")
        differentiate(lambda *w: sae_kernels.normalize_weights(w, gains, dtype=dtype, impl="cpp"), *weights)  # noqa: B023


def frame_attention() -> None:
    from sae_kernels.frame_attention import ops

    if "cpp" not in ops.implementations(torch.device("cpu"))[0]:
        return
    layouts = [
        FrameLayout(1, 1),
        FrameLayout(5, 3, noisy_copies=2),
        FrameLayout(7, 5, frames_per_block=2, window=1, sink=1),
        FrameLayout(3, 67, noisy_first=True),
        FrameLayout(9, 16, noisy_copies=0, window=2),
    ]
    for layout, dim, dtype in itertools.product(
        layouts, (1, 8, 33, 64), (torch.float32, torch.bfloat16, torch.float16)
    ):
        heads, keys = (4, 2) if dim % 2 else (2, 2)
        k = variants(torch.randn(2, keys, layout.sequence_length, dim).to(dtype))
        for noisy_only in (False, True)[: 1 + (layout.noisy_copies > 0)]:
            rows = layout.sequence_length * (layout.noisy_copies if noisy_only else layout.streams) // layout.streams
            q = variants(torch.randn(2, heads, rows, dim).to(dtype))
            options = {"noisy_queries_only": noisy_only, "return_lse": True, "impl": "cpp"}
            for i in range(len(q)):
                differentiate(
                    lambda *a: sae_kernels.frame_attention(*a, layout, **options)[0],  # noqa: B023
                    q[i], k[(i + 1) % 4], k[(i + 2) % 4],
                )  # fmt: skip


def small_steps() -> None:
    """Less than a vector, whole vectors and not; rows of channels and channels apart; past the caches from 8 MiB on."""
    steps = sae_kernels
    shapes = [(2, 3, 1, 1), (1, 16, 2, 33), (2, 70, 3, 21), (1, 5, 2, 300), (1, 2100, 1, 3), (1, 128, 1, 16390)]
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16, torch.float16), shapes):
        large = shape[3] > 1000
        videos = variants(torch.randn(shape).to(dtype))[: 2 if large else 4]
        videos.append(videos[0].movedim(1, -1).contiguous().movedim(-1, 1))
        scale = torch.rand(shape[0], shape[2], shape[1])
        for x, y in zip(videos, [*videos[1:], videos[0]], strict=True):
            differentiate(lambda x: steps.mp_silu(x, impl="cpp"), x)
            differentiate(lambda x, y: steps.mp_sum(x, y, 0.3, impl="cpp"), x, y)
            differentiate(lambda x, y: steps.mp_sum(x, y, 0.3, limit=0.5, impl="cpp"), x, y)
            differentiate(lambda x, y: steps.mp_cat(x, y[:, :2], impl="cpp"), x, y)
            differentiate(lambda x, scale: steps.modulated_silu(x, scale, impl="cpp"), x, scale)
            for dim in (1,) if large else (0, 1, 2, 3):
                differentiate(lambda x: steps.pixel_norm(x, dim, impl="cpp"), x)  # noqa: B023
                differentiate(lambda x: steps.pixel_norm_silu(x, dim, impl="cpp"), x)  # noqa: B023


def qk_prepare() -> None:
    layouts = [
        (FrameLayout(3, 6), {"grid": (2, 3)}),
        (FrameLayout(5, 7), {"start": 3}),
        (torch.arange(36), {}),
        (None, {}),
    ]
    for dim, dtype, interleaved in itertools.product(
        (6, 13, 64), (torch.float32, torch.bfloat16, torch.float16), (False, True)
    ):
        for positions, options in layouts:
            length = positions.sequence_length if isinstance(positions, FrameLayout) else 36
            if positions is not None and dim % 2:
                axes = (6, 4, 2) if "grid" in options else (12,)
                options = options | {"axes": axes}
            options = options | {"interleaved": interleaved, "impl": "cpp"}
            qs = variants(torch.randn(2, 3, length, dim).to(dtype))
            for q, k in zip(qs, [*qs[1:], qs[0]], strict=True):
                differentiate(
                    lambda *a: sae_kernels.qk_prepare(*a, positions, normalize_v=True, **options),  # noqa: B023
                    q, k[:, :1], k[:, 1:2],
                )  # fmt: skip
            qkv = torch.randn(2, length, 5, dim).to(dtype)
            differentiate(lambda x: sae_kernels.qkv_prepare(x, positions, kv_heads=1, **options), qkv)  # noqa: B023


def causal_conv3d() -> None:
    shapes = (
        # channels, map, kernel, layout
        ((3, 5), (4, 5), (3, 3, 3), FrameLayout(5, 1, noisy_copies=2)),
        ((33, 17), (1, 1), (2, 3, 5), FrameLayout(3, 1, noisy_copies=0)),
        ((16, 64), (17, 18), (3, 1, 3), FrameLayout(2, 1, noisy_first=True)),
        ((300, 4), (3, 2), (4, 5, 1), FrameLayout(9, 1)),
        ((4, 70), (2, 300), (1, 3, 3), FrameLayout(1, 1, noisy_copies=3)),
    )
    for (cin, cout), size, kernel, layout in shapes:
        frames, kt = layout.total_frames, kernel[0]
        last = [(2, layout.total_frames, *size, cin), (2, kt - 1, *size, cin)]
        x, history = (variants(torch.randn(shape)) for shape in last)
        weight, scales = torch.randn(cout, cin, *kernel), [torch.randn(2, frames) for _ in range(2)]
        for i in range(len(x)):
            video, before = (v[i].permute(0, 4, 1, 2, 3) for v in (x, history))
            convolve = functools.partial(sae_kernels.causal_conv3d, layout=layout, pad_value=0.5, impl="cpp")

            def with_everything(x, w, p, s, h, convolve=convolve):
                return convolve(x, w, past_scale=p, last_scale=s, history=h)

            differentiate(convolve, video, weight)
            differentiate(with_everything, video, weight, *scales, before)
            if kt > 1:
                differentiate(functools.partial(sae_kernels.past_term, impl="cpp"), before, weight)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    reason = _extension.library("cpu")
    if reason is not None:
        raise SystemExit(reason)
    ops = native_ops()
    called = watch(ops)
    exercises = (
        token_noise, edm_loss, normalize_weights, frame_attention, small_steps, qk_prepare, causal_conv3d,
    )  # fmt: skip
    for exercise in exercises:
        exercise()
        print(exercise.__name__, flush=True)
    missing = sorted(set(ops) - set(called))
    if missing:
        raise SystemExit(f"not called, add them to exercise.py: {', '.join(missing)}")
    print(f"{called.total()} calls of {len(ops)} ops: {', '.join(ops)}")


if __name__ == "__main__":
    main()
