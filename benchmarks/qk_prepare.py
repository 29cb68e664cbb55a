"""qkv_prepare and qk_prepare against eager PyTorch and torch.compile.

B batch, T frames, K noisy copies, P tokens per frame, H heads (Hkv of k and v), D head dim. The peers get the cosines
and sines ready made; ours makes them in the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sae_kernels import FrameLayout, qk_prepare, qkv_prepare
from sae_kernels.qk_prepare import ops, reference

from . import gate, measure
from .registry import Case, Contender, Problem

NETWORK = {"B": 8, "T": 16, "H": 2, "P": 64, "D": 64}
WAN = {"B": 1, "T": 21, "H": 12, "P": 1560, "D": 128, "grid": (30, 52), "rotation_alone": True}
CASES = [
    Case("qk-prepare", "lunar-lander-8x8", "q, k and v of the lunar-lander network's 8x8 level, from one tensor",
         NETWORK | {"dtype": "bf16"}, NETWORK | {"dtype": "fp32", "B": 2}, 19, True),
    Case("qk-prepare", "grouped", "32 query heads on 8 of k and v, as SDAR has them; v not normalised",
         {"B": 1, "T": 128, "P": 32, "H": 32, "Hkv": 8, "D": 128, "dtype": "bf16"},
         {"B": 1, "T": 16, "P": 32, "H": 32, "Hkv": 8, "D": 128, "dtype": "fp32"}, 43),
    Case("qk-prepare", "wan-rotation", "Wan's rotation over frame, row and column, interleaved pairs, q and k apart",
         WAN | {"dtype": "bf16"}, WAN | {"dtype": "fp32", "T": 1, "H": 4}, 44),
    Case("qk-prepare", "smoke", "milliseconds for everything", None,
         {"B": 1, "T": 2, "P": 4, "H": 2, "D": 16, "dtype": "fp32"}, dry=True),
]  # fmt: skip
EPS = 1e-4


def build(shape: Mapping[str, Any], device: str) -> Problem:
    dtype = measure.DTYPES[shape["dtype"]]
    B, H, D, grid, alone = shape["B"], shape["H"], shape["D"], shape.get("grid"), shape.get("rotation_alone", False)
    kv_heads = shape.get("Hkv", H)
    heads = [H, kv_heads] if alone else [H, kv_heads, kv_heads]
    layout = FrameLayout(shape["T"], shape["P"], noisy_copies=shape.get("K", 1))
    S = layout.sequence_length
    normalize_v = not alone and kv_heads == H
    normalized = (not alone, not alone, normalize_v)
    axes = [D - 4 * (D // 6), 2 * (D // 6), 2 * (D // 6)] if grid else [D]
    width = grid[1] if grid else shape["P"]
    place = reference.layout_positions(S, layout.frames, shape["P"], width, 0, len(axes), torch.device(device))
    angle = reference.angles(place, axes, 10000.0)
    tables = {d: (angle.cos().to(d), angle.sin().to(d)) for d in (torch.float32, torch.float64)}

    def make_inputs(index: int) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(index)

        def random(count: int) -> torch.Tensor:
            return torch.randn(B, S, count, D, generator=generator, device=device).to(dtype)

        tensors = [random(count).requires_grad_() for count in (heads if alone else [sum(heads)])]
        return {"tensors": tensors, "grads": [random(count).transpose(1, 2) for count in heads]}

    def ours(*tensors: torch.Tensor, impl: str) -> tuple[torch.Tensor, ...]:
        if alone:
            q, k = (t.transpose(1, 2) for t in tensors)
            return qk_prepare(q, k, None, layout, grid=grid, interleaved=True, normalize=False, impl=impl)
        return qkv_prepare(*tensors, layout, kv_heads=kv_heads, normalize_v=normalize_v, impl=impl)

    def eager(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One rounding at the end; every step as a user of rotary embedding writes it."""
        if alone:
            parts = [t.transpose(1, 2) for t in tensors]
        else:
            parts = list(tensors[0].transpose(1, 2).split(heads, dim=1))
        cos, sin = tables[torch.float64 if parts[0].dtype == torch.float64 else torch.float32]
        outs = []
        for index, part in enumerate(parts):
            x = part.to(cos.dtype)
            if normalized[index]:
                x = x / (EPS + torch.linalg.vector_norm(x, dim=-1, keepdim=True) / D**0.5)
            if index < 2 and alone:
                a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
                x = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
            elif index < 2:
                a, b = x.chunk(2, dim=-1)
                x = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
            outs.append(x.to(part.dtype))
        return tuple(outs)

    def directions(function: Callable[..., tuple[torch.Tensor, ...]]) -> dict[str, Callable]:
        @torch.no_grad()
        def forward(inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            return function(*inputs["tensors"])

        def both(inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            outs = function(*inputs["tensors"])
            return (*[o.detach() for o in outs], *torch.autograd.grad(outs, inputs["tensors"], inputs["grads"]))

        return {"fwd": forward, "fwd+bwd": both}

    contenders = gate.ours(ops, device, lambda impl: directions(lambda *tensors: ours(*tensors, impl=impl)))
    contenders.append(Contender("eager", directions(eager)))
    contenders.append(Contender("eager, compiled", directions(torch.compile(eager, dynamic=False)), compiled=True))
    names = ("q", "k", "dq", "dk") if alone else ("q", "k", "v", "dqkv")
    made: dict[str, Any] = {}

    def check(contender: Contender, direction: str) -> None:
        if not made:
            made["inputs"] = given = make_inputs(0)
            wide = {
                "tensors": [t.detach().double().requires_grad_() for t in given["tensors"]],
                "grads": [g.double() for g in given["grads"]],
            }
            both = directions(eager)["fwd+bwd"]
            made["gold"], made["eager"] = (dict(zip(names, both(i))) for i in (wide, given))
        results = dict(zip(names, contender.launch[direction](made["inputs"])))
        gate.hold(contender, results, made["gold"], made["eager"])

    one = B * S * sum(heads) * D * dtype.itemsize
    # Backward reads the gradient, and the output of what was normalised.
    kept = one * sum(n for n, wanted in zip(heads, normalized) if wanted) // sum(heads)
    return Problem(make_inputs, contenders, check, shape["dtype"], {}, {"fwd": 2 * one, "fwd+bwd": 4 * one + kept})
