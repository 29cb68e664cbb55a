"""The magnitude-preserving functions and forced weight normalisation against eager PyTorch and torch.compile.

B batch, C channels, F frames, Y, X pixels; activations are (B, C, F, Y, X) in channels_last_3d memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

import sae_kernels
from sae_kernels.activations import ops, reference
from sae_kernels.weight_norm import reference as weight_reference

from . import gate, measure
from .gate import Inputs
from .registry import Case, Contender, Problem

ACTIVATION = {"B": 8, "C": 64, "F": 32, "size": 32}
ABOUT = "activations of the 32x32 level of the lunar-lander network"


def _case(function: str, priority: int, quick: bool = False) -> Case:
    cuda = {"function": function, "dtype": "bf16"} | ACTIVATION
    return Case("magnitude", function, ABOUT, cuda, cuda | {"dtype": "fp32", "B": 2}, priority, quick)


CASES = [
    Case("magnitude", "weights", "forced weight normalisation of all weights of the lunar-lander network",
         {"preset": "lunar-lander"}, {"preset": "lunar-lander"}, 6, True),
    _case("pixel_norm", 18), _case("mp_silu", 40), _case("mp_sum", 41), _case("mp_cat", 42),
    _case("pixel_norm_silu", 19), _case("modulated_silu", 19), _case("mp_sum_limit", 20),
    Case("magnitude", "smoke", "milliseconds for everything", None,
         {"function": "pixel_norm", "dtype": "fp32", "B": 1, "C": 8, "F": 2, "size": 4}, dry=True),
    Case("magnitude", "smoke-fused", "milliseconds for everything", None,
         {"function": "pixel_norm_silu", "dtype": "fp32", "B": 1, "C": 8, "F": 2, "size": 4}, dry=True),
    Case("magnitude", "smoke-modulated", "milliseconds for everything", None,
         {"function": "modulated_silu", "dtype": "fp32", "B": 1, "C": 8, "F": 2, "size": 4}, dry=True),
    Case("magnitude", "smoke-weights", "milliseconds for everything", None, {"preset": "nano"}, dry=True),
]  # fmt: skip

# (ours, the specification in eager PyTorch, number of inputs, passes over one input's size: forward, backward)
FUNCTIONS: dict[str, tuple[Callable, Callable, int, int, int]] = {
    "mp_silu": (sae_kernels.mp_silu, reference.mp_silu, 1, 2, 3),
    "mp_sum": (lambda a, b, **o: sae_kernels.mp_sum(a, b, 0.3, **o), lambda a, b: reference.mp_sum(a, b, 0.3), 2, 3, 3),
    "mp_cat": (lambda a, b, **o: sae_kernels.mp_cat(a, b, **o), lambda a, b: reference.mp_cat(a, b, 1, 0.5), 2, 4, 4),
    "mp_sum_limit": (
        lambda a, b, **o: sae_kernels.mp_sum(a, b, 0.3, limit=256.0, **o),
        lambda a, b: reference.mp_sum(a, b, 0.3, 256.0),
        2, 3, 4,
    ),
    "pixel_norm_silu": (sae_kernels.pixel_norm_silu, lambda x: reference.pixel_norm_silu(x, 1, 1e-4), 1, 3, 4),
    # and a scale of each frame and channel
    "modulated_silu": (sae_kernels.modulated_silu, reference.modulated_silu, 1, 2, 3),
    "pixel_norm": (sae_kernels.pixel_norm, lambda x: reference.pixel_norm(x, 1, 1e-4), 1, 2, 3),
}  # fmt: skip


def build(shape: Mapping[str, Any], device: str) -> Problem:
    if "preset" in shape:
        return _weights(shape, device)
    ours, eager, count, forward, backward = FUNCTIONS[shape["function"]]
    dtype = measure.DTYPES[shape["dtype"]]
    B, C, frames, size = (shape[key] for key in ("B", "C", "F", "size"))

    def make_inputs(index: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(index)

        def video(channels: int) -> torch.Tensor:
            x = torch.randn(B, frames, size, size, channels, generator=generator, device=device)
            return x.to(dtype).permute(0, 4, 1, 2, 3)

        wide = 2 * C if shape["function"] == "mp_cat" else C
        tensors = [video(C) for _ in range(count)]
        if shape["function"] == "modulated_silu":
            tensors.append(torch.randn(B, frames, C, generator=generator, device=device).to(dtype))
        return Inputs(tuple(t.requires_grad_() for t in tensors), video(wide))

    contenders = gate.ours(ops, device, lambda impl: gate.directions(lambda *tensors: ours(*tensors, impl=impl)))
    contenders.append(Contender("eager", gate.directions(eager)))
    compiled = torch.compile(eager, dynamic=False)
    contenders.append(Contender("eager, compiled", gate.directions(compiled), compiled=True))
    names = ("out", "activation", "da") if shape["function"] == "pixel_norm_silu" else ("out", "da", "db")
    check = gate.reference_check(lambda: make_inputs(0), eager, names)
    one = B * C * frames * size**2 * dtype.itemsize
    moved = {"fwd": forward * one, "fwd+bwd": (forward + backward) * one}
    return Problem(make_inputs, contenders, check, shape["dtype"], {}, moved)


def _weights(shape: Mapping[str, Any], device: str) -> Problem:
    from sae_diffusion.model import Denoiser

    from .train_step import config_of

    config = config_of(shape)

    def make_inputs(index: int) -> dict[str, Any]:
        torch.manual_seed(index)
        model = Denoiser(config).to(device)
        return {"model": model, "weights": normalised_weights(model)}

    def eager(weights: list[torch.Tensor]) -> None:
        for w in weights:
            w.copy_(weight_reference.normalize_weight(w, math.sqrt(w[0].numel())))

    def launch(function: Callable[[dict[str, Any]], None]) -> dict[str, Callable]:
        @torch.no_grad()
        def run(inputs: dict[str, Any]) -> list[torch.Tensor]:
            function(inputs)
            return inputs["weights"]

        return {"fwd": run}

    contenders = [
        Contender("Denoiser.normalize_weights_", launch(lambda i: i["model"].normalize_weights_()), "ours"),
        Contender("eager loop", launch(lambda i: eager(i["weights"]))),
    ]

    def check(contender: Contender, direction: str) -> None:
        inputs = make_inputs(0)
        with torch.no_grad():
            for w in inputs["weights"]:
                w.mul_(1.5)
        before = [w.detach().clone() for w in inputs["weights"]]
        for i, (w, actual) in enumerate(zip(before, contender.launch[direction](inputs))):
            gain = math.sqrt(w[0].numel())
            gold, same = weight_reference.normalize_weight(w.double(), gain), weight_reference.normalize_weight(w, gain)
            name = f"weight {i}"
            gate.hold(contender, {name: actual.detach()}, {name: gold}, {name: same})

    elements = sum(w.numel() for w in make_inputs(0)["weights"])
    # Each weight read once and written once.
    return Problem(make_inputs, contenders, check, "fp32", {}, {"fwd": 8 * elements}, largest_sets=2)


def normalised_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """The stored weights that a model's forced normalisation is about."""
    return [w for module in model.modules() if hasattr(module, "raw_weights") for w in module.raw_weights()]
