"""The one place where ops are registered with PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

NAMESPACE = "sae_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")
# What each op runs, for those who count what is inside: a dispatch mode sees the op alone.
implementations: dict[torch._ops.OpOverload, Callable] = {}


def define(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    tags: Sequence[torch.Tag] = (torch.Tag.needs_fixed_stride_order,),
) -> torch._ops.OpOverload:
    """Define one op from its schema, its implementation for every device, and its shape function.

    `implementation` picks the backend itself (CPU and CUDA alike), so the dispatcher holds one entry for each op.
    `needs_fixed_stride_order` keeps torch.compile from handing the kernels other strides than eager mode would.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=tuple(tags))
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    implementations[op] = implementation
    return op


def register_autograd(op: torch._ops.OpOverload, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(op._schema.name, backward, setup_context=setup_context, lib=_library)


def register_autocast(op: torch._ops.OpOverload) -> None:
    """Under autocast, cast floating-point inputs to the autocast dtype, as matmul and convolution do."""
    name = op._schema.name.split("::")[1]

    def make(device: str, key: torch._C.DispatchKey) -> Callable:
        def autocast(*args, **kwargs):
            dtype = torch.get_autocast_dtype(device)

            def cast(value):
                lower = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
                return value.to(dtype) if lower else value

            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*[cast(a) for a in args], **{k: cast(v) for k, v in kwargs.items()})

        return autocast

    _library.impl(name, make("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
    _library.impl(name, make("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")


def constant_in_graphs(function: Callable) -> Callable:
    """Let torch.compile call the function while it traces and keep the result as a constant.

    This is torch.compiler.assume_constant_result without its import of all of torch._dynamo, seconds at every start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
