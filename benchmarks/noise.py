"""token_noise against eager PyTorch and torch.compile. B batch, T frames, F = (1 + K) T."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sae_kernels import FrameLayout, token_noise
from sae_kernels.testing import assert_within_budget
from sae_kernels.token_noise import ops, reference

from . import gate, measure
from .registry import Case, Contender, Problem

# x: (B, T, C, Y, X); dtype: of x; out: of the output.
CASES = [
    Case("noise", "2^24", "2^24 elements out, fp32", {"x": (16, 16, 32, 32, 32)}, {"x": (16, 16, 32, 32, 32)}, 4,
         True),
    Case("noise", "latents", "a micro-batch of Counter-Strike latents", {"x": (2, 16, 8, 32, 32), "out": "bf16"},
         {"x": (2, 16, 8, 32, 32)}, 17),
    Case("noise", "2^28", "2^28 elements out in bf16", {"x": (16, 16, 128, 64, 64), "out": "bf16"}, None, 5, True),
    Case("noise", "smoke", "milliseconds for everything", None, {"x": (2, 3, 2, 4, 4)}, dry=True),
]  # fmt: skip


def build(shape: Mapping[str, Any], device: str) -> Problem:
    layout = FrameLayout(shape["x"][1], 1, noisy_copies=shape.get("K", 1))
    out_dtype = measure.DTYPES[shape.get("out", "fp32")]

    def make_inputs(index: int) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(index)
        x = torch.randn(shape["x"], generator=generator, device=device)
        sigma = torch.rand(x.shape[0], layout.total_frames, generator=generator, device=device) + 0.1
        return {"x": x, "signal": torch.rsqrt(1 + sigma**2), "noise": sigma, "seed": index}

    def per_frame(scale: torch.Tensor) -> torch.Tensor:
        return scale[:, :, None, None, None]

    def eager(x: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        data = torch.cat([x] * layout.streams, dim=1)
        return (per_frame(signal) * data + per_frame(noise) * torch.randn_like(data)).to(out_dtype)

    def plain(function):
        return {"fwd": lambda i: function(i["x"], i["signal"], i["noise"])}

    def ours(i: dict[str, Any], impl: str) -> torch.Tensor:
        return token_noise(i["x"], i["signal"], i["noise"], layout, seed=i["seed"], dtype=out_dtype, impl=impl)

    contenders = gate.ours(ops, device, lambda impl: {"fwd": lambda i: ours(i, impl)})
    contenders.append(Contender("eager randn, cat, mul, add", plain(eager)))
    contenders.append(Contender("the same, compiled", plain(torch.compile(eager, dynamic=False)), compiled=True))
    # Inductor's own random numbers are slow on a CPU.
    with_eager_numbers = torch.compile(eager, dynamic=False, options={"fallback_random": True})
    contenders.append(Contender("the same, compiled around eager randn", plain(with_eager_numbers), compiled=True))

    made: dict[str, Any] = {}

    def check(contender: Contender, direction: str) -> None:
        if not made:
            made["inputs"] = i = make_inputs(0)
            scales = [per_frame(i[key]) for key in ("signal", "noise")]
            rest = (layout.streams, i["seed"], 0)
            made["gold"], _ = reference.token_noise(
                i["x"].double(), *(s.double() for s in scales), *rest, torch.float64
            )
            made["eager"], _ = reference.token_noise(i["x"], *scales, *rest, out_dtype)
        i = made["inputs"]
        out = contender.launch[direction](i)
        if contender.kind == "ours":
            assert_within_budget(out, made["gold"], made["eager"], "out")
        else:
            assert_moments(out, i["x"], per_frame(i["signal"]), per_frame(i["noise"]), layout)

    elements = torch.Size(shape["x"]).numel()
    moved = {"fwd": elements * (4 + layout.streams * out_dtype.itemsize)}
    return Problem(make_inputs, contenders, check, "fp32", {}, moved)


def assert_moments(out, x, signal, noise, layout: FrameLayout) -> None:
    """A peer draws other numbers: (out - signal x) / noise must have mean 0, variance 1, within six standard errors."""
    eps = (out.double() - signal * torch.cat([x] * layout.streams, dim=1)) / noise
    mean, variance = eps.mean().item(), eps.var().item()
    error = eps.numel() ** -0.5
    rounding = torch.finfo(out.dtype).eps
    assert abs(mean) <= 6 * error + rounding, f"mean of the noise is {mean:.3e}"
    assert abs(variance - 1) <= 6 * 2**0.5 * error + rounding, f"variance of the noise is {variance:.6f}"
