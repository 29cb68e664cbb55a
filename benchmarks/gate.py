"""The correctness gate: no figure of a case whose result is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from sae_kernels.testing import assert_within_budget

from .registry import Contender


def ours(ops: ModuleType, device: str, launch: Callable[[str], dict[str, Callable]]) -> list[Contender]:
    """Our contenders: the default, then the implementations it does not choose, without specification and interpreter.

    `launch` maps an `impl` to the launches. What only some sizes or dtypes have may fail to run.
    """
    available, _ = ops.implementations(torch.device(device))
    timed = [i for i in available if i != "reference" and not (i == "triton" and device == "cpu")]
    first = Contender("sae_kernels", launch("auto"), kind="ours", note=f"auto takes {timed[0]}")
    others = [Contender(f"sae_kernels ({i})", launch(i), kind="ours", note=i, optional=True) for i in timed[1:]]
    return [first, *others]


def assert_half_the_digits(actual: torch.Tensor, gold: torch.Tensor, name: str) -> None:
    """The bar for peers, whose rounding is their own affair: relative error up to the root of their dtype's epsilon.

    A wrong mask, tap or scale is an error of order one.
    """
    assert actual.shape == gold.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(gold.shape)}"
    error, size = (actual.double() - gold).norm().item(), gold.norm().item()
    limit = torch.finfo(actual.dtype).eps ** 0.5
    # A NaN compares false with everything.
    assert error <= limit * size, f"{name}: relative error {error / max(size, 1e-300):.2e}, allowed {limit:.2e}"


def hold(
    contender: Contender,
    results: Mapping[str, torch.Tensor],
    gold: Mapping[str, torch.Tensor],
    eager: Mapping[str, torch.Tensor],
    *,
    roundings: float | Mapping[str, float] = 4.0,
) -> None:
    """Compare named results: ours to the error of `eager` against fp64 `gold`, a peer to half its digits."""
    for name, actual in results.items():
        if contender.kind == "ours":
            granted = roundings[name] if isinstance(roundings, Mapping) else roundings
            assert_within_budget(actual, gold[name], eager[name], name, roundings=granted)
        else:
            assert_half_the_digits(actual, gold[name], name)


def roundings_of_sums(
    gold: Mapping[str, torch.Tensor], absolute: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """Roundings to grant to long sums: four, and an fp32 one of the summed absolute terms, however far they cancel.

    `absolute` is gold with the absolute values of all inputs; an fp32 sum in another order may differ by that.
    """
    unit = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    return {name: 4 + unit * (absolute[name].mean() / gold[name].abs().mean()).item() for name in gold}


@dataclass
class Inputs:
    """Arguments of a differentiable op, those with requires_grad wanted, and the gradient of its output."""

    tensors: tuple[torch.Tensor, ...]
    grad: torch.Tensor

    @property
    def wanted(self) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in self.tensors if t.requires_grad)


def directions(function: Callable[..., Any], backward: bool = True) -> dict[str, Callable[[Inputs], Any]]:
    """Launches of a differentiable function of tensors: "fwd" -> (out,), "fwd+bwd" -> (out, *gradients of `wanted`).

    Of several outputs each has the gradient `grad`.
    """

    def outputs(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        out = function(*inputs.tensors)
        return out if isinstance(out, tuple) else (out,)

    forward = torch.no_grad()(outputs)

    def both(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        outs = outputs(inputs)
        grads = torch.autograd.grad(outs, inputs.wanted, [inputs.grad] * len(outs))
        return (*[out.detach() for out in outs], *grads)

    return {"fwd": forward, "fwd+bwd": both} if backward else {"fwd": forward}


def reference_check(
    inputs: Callable[[], Inputs], reference: Callable[..., torch.Tensor], names: tuple[str, ...]
) -> Callable[[Contender, str], None]:
    """A `Problem.check` for ops whose reference runs at full size: gold in fp64, eager at the dtype of the inputs.

    `names` are those of the output and of the gradients.
    """
    made: dict[str, Any] = {}

    def check(contender: Contender, direction: str) -> None:
        if not made:
            given = inputs()
            launch = directions(reference)["fwd+bwd"]
            wide = [t.detach().double().requires_grad_(t.requires_grad) for t in given.tensors]
            made["inputs"] = given
            made["gold"] = dict(zip(names, launch(Inputs(tuple(wide), given.grad.double()))))
            made["eager"] = dict(zip(names, launch(given)))
        given = made["inputs"] if contender.adapt is None else contender.adapt(made["inputs"])
        results = dict(zip(names, contender.launch[direction](given)))
        hold(contender, results, made["gold"], made["eager"])

    return check
