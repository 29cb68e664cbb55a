"""The one place where ops are registered with PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

NAMESPACE = "sae_kernels"


class _Library(torch.library.Library):
    """Its ops refuse forward-mode derivatives, which PyTorch would silently drop."""

    def impl(self, op_name, fn, dispatch_key="", **options):
        def refusing(*args, **kwargs):
            _refuse_tangents(differentiable[op_name], (args, kwargs))
            return fn(*args, **kwargs)

        return super().impl(op_name, refusing if dispatch_key == "Autograd" else fn, dispatch_key, **options)


_library = _Library(NAMESPACE, "DEF")
# What each op runs, for code that counts the work inside: a dispatch mode sees only the op.
implementations: dict[torch._ops.OpOverload, Callable] = {}
# The ops with a gradient, and the public function that each one's errors name.
differentiable: dict[str, str] = {}


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


def register_autograd(
    op: torch._ops.OpOverload,
    backward: Callable,
    setup_context: Callable,
    *,
    name: str | None = None,
    twice: bool = False,
) -> None:
    """Give an op its gradient. Differentiating that again is an error.

    `name`: the public function, if it differs from the op's. `twice`: everything that `backward` runs is correctly
    differentiable itself.
    """
    op_name = op._schema.name.split("::")[1]
    name = differentiable[op_name] = name or op_name.removesuffix("_fwd")

    def once(ctx, *grads):
        _refuse_tangents(name, grads)
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found, structure = tree_flatten(backward(ctx, *grads))
        sources = [t for t in tree_flatten((grads, ctx.saved_tensors))[0] if t is not None and t.requires_grad]
        made = [i for i, grad in enumerate(found) if grad is not None]
        if sources and made:
            for i, grad in zip(made, _Once.apply(name, [found[i] for i in made], *sources), strict=True):
                found[i] = grad
        return tree_unflatten(found, structure)

    gradient = backward if twice else once
    torch.library.register_autograd(op._schema.name, gradient, setup_context=setup_context, lib=_library)


class _Once(torch.autograd.Function):
    """Passes gradients on, tied to all tensors they were computed from; differentiating them is an error.

    torch.autograd.function.once_differentiable ties them to the incoming gradients only.
    """

    @staticmethod
    def forward(ctx, name, gradients, *sources):
        ctx.name = name
        return tuple(gradient.detach() for gradient in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f'{ctx.name} is differentiable only once; use impl="reference" for higher derivatives')


def _refuse_tangents(name: str, values: object) -> None:
    if forward_ad._current_level < 0:
        return
    for value in tree_flatten(values)[0]:
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(f'{name} has no forward-mode derivative; use impl="reference"')


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

    This is torch.compiler.assume_constant_result without its import of torch._dynamo, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
