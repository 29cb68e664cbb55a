"""Tensors in safetensors files, checked against the tensors they are to fill before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def check_header(
    path: str | os.PathLike[str], expected: Mapping[str, torch.Tensor], *, check_dtype: bool = True
) -> None:
    """Compare a safetensors header with the tensors it is to fill, reading no data and allocating nothing.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or dtype; the message names the first such one.
    """
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for name in sorted(expected.keys() - names):
                raise ValueError(f"{path}: tensor {name} is missing")
            for name in sorted(names - expected.keys()):
                raise ValueError(f"{path}: tensor {name} does not belong to the model")
            for name, want in expected.items():
                view = file.get_slice(name)
                shape, dtype = tuple(view.get_shape()), _DTYPES.get(view.get_dtype(), view.get_dtype())
                if shape != tuple(want.shape):
                    raise ValueError(f"{path}: tensor {name} must have shape {tuple(want.shape)}, got {shape}")
                if check_dtype and dtype != want.dtype:
                    raise ValueError(f"{path}: tensor {name} must be {want.dtype}, got {dtype}")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


@torch.no_grad()
def load_into(path: str | os.PathLike[str], targets: Mapping[str, torch.Tensor], *, check_dtype: bool = True) -> None:
    """Copy a safetensors file into existing tensors, after `check_header`."""
    check_header(path, targets, check_dtype=check_dtype)
    with safe_open(path, "pt") as file:
        for name, target in targets.items():
            target.copy_(file.get_tensor(name))


def flatten_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as <parameter>.<key> -> tensor."""
    return {
        f"{name}.{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(path: str | os.PathLike[str], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what `flatten_optimizer` returned. A parameter that never had a gradient has no state.

    Raises:
        ValueError: a tensor belongs to no parameter or has another shape; the message names it.
    """
    parameters = dict(model.named_parameters())
    expected: dict[str, torch.Tensor] = {}
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    for name in names:
        parameter = parameters.get(name.rpartition(".")[0])
        if parameter is None:
            raise ValueError(f"{path}: tensor {name} belongs to no parameter of the model")
        expected[name] = torch.empty((), device="meta") if name.endswith(".step") else parameter
    check_header(path, expected, check_dtype=False)
    tensors = load_file(path)
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {id(p): i for i, p in enumerate(order)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        state.setdefault(index[id(parameters[owner])], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
