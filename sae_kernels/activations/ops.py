"""Registration of the magnitude-preserving functions: schemas, shapes, gradients, and the backend switch.

There is no autocast rule: the ops keep the dtype of their input and compute in fp32 whatever the autocast dtype.
Outputs have the memory order of the (first) input.
"""

from __future__ import annotations

import torch

from .. import _extension, _launch, _library
from .._tensors import empty_if, rms_like
from . import composed, cpp


def implementations(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    no_cpp: str | None = None,
    no_triton: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """(those that run on this device, fastest first; those that do not, with the reason).

    `no_cpp`, `no_triton`: why those kernels do not take these arguments.
    """
    available = ["composed", "reference"]
    why_not: dict[str, str] = {}
    narrow = "it computes in float32; float64 is for composed and reference" if dtype == torch.float64 else None
    _extension.offer_on_cpu(available, why_not, device, narrow or no_cpp)
    reason = _launch.why_not(device) or narrow or no_triton
    if reason is not None:
        why_not["triton"] = reason
    else:
        # The interpreter serves tests: never the choice of "auto".
        available.insert(0 if device.type == "cuda" else len(available), "triton")
    return available, why_not


def varies_inside_frames(t: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether t, which broadcasts to x, is more than one value for each (dim 0, dim 2)."""
    shape = (1,) * (x.ndim - t.ndim) + tuple(t.shape)
    return any(n != 1 for d, n in enumerate(shape) if d not in (0, 2))


def _backend(impl: str):
    if impl == "composed":
        return composed
    if impl == "cpp":
        return cpp
    if impl == "triton":
        from . import triton

        return triton
    raise ValueError(f"impl: the activations have no registered implementation {impl!r}")


def _silu(x, impl):
    out = torch.empty_like(x)
    _backend(impl).mp_silu(x, out)
    return out


def _silu_backward(grad_out, x, impl):
    grad_x = torch.empty_like(x)
    _backend(impl).mp_silu_backward(grad_out, x, grad_x)
    return grad_x


mp_silu = _library.define("mp_silu(Tensor x, str impl) -> Tensor", _silu, lambda x, impl: torch.empty_like(x))
mp_silu_bwd = _library.define(
    "mp_silu_bwd(Tensor grad_out, Tensor x, str impl) -> Tensor",
    _silu_backward,
    lambda grad_out, x, impl: torch.empty_like(x),
)


def _silu_context(ctx, inputs, output) -> None:
    x, ctx.impl = inputs
    ctx.save_for_backward(x)


_library.register_autograd(
    mp_silu, lambda ctx, grad: (mp_silu_bwd(grad, *ctx.saved_tensors, ctx.impl), None), _silu_context
)


def _representable(limit, dtype):
    """The limit as the output holds it, so that backward finds it there."""
    return None if limit is None else torch.tensor(limit, dtype=dtype).item()


def _sum(a, b, t, limit, impl):
    out = torch.empty_like(a)
    _backend(impl).mp_sum(a, b, t, _representable(limit, a.dtype), out)
    return out


def _empty_sum_backward(grad_out, out, t, limit, needs_a, needs_b, impl):
    return empty_if(needs_a, grad_out), empty_if(needs_b, grad_out)


def _sum_backward(grad_out, out, t, limit, needs_a, needs_b, impl):
    grads = _empty_sum_backward(grad_out, out, t, limit, needs_a, needs_b, impl)
    wanted = [g if needed else None for g, needed in zip(grads, (needs_a, needs_b), strict=True)]
    _backend(impl).mp_sum_backward(grad_out, out, t, _representable(limit, grad_out.dtype), *wanted)
    return grads


mp_sum = _library.define(
    "mp_sum(Tensor a, Tensor b, float t, float? limit, str impl) -> Tensor",
    _sum,
    lambda a, b, t, limit, impl: torch.empty_like(a),
)
mp_sum_bwd = _library.define(
    "mp_sum_bwd(Tensor grad_out, Tensor? out, float t, float? limit, bool needs_a, bool needs_b, str impl) "
    "-> (Tensor, Tensor)",
    _sum_backward,
    _empty_sum_backward,
)


def _sum_context(ctx, inputs, output) -> None:
    ctx.options = inputs[2:]
    ctx.save_for_backward(output if ctx.options[1] is not None else None)


def _sum_gradient(ctx, grad_out):
    needs = ctx.needs_input_grad[:2]
    t, limit, impl = ctx.options
    grads = mp_sum_bwd(grad_out, *ctx.saved_tensors, t, limit, *needs, impl)
    return (*[g if needed else None for g, needed in zip(grads, needs, strict=True)], None, None, None)


_library.register_autograd(mp_sum, _sum_gradient, _sum_context)


def _modulated(x, scale, impl):
    out = torch.empty_like(x)
    _backend(impl).modulated_silu(x, scale, out)
    return out


def _empty_modulated_backward(grad_out, x, scale, needs_x, needs_scale, impl):
    # A contiguous gradient for the scale, whatever the strides of the scale.
    return empty_if(needs_x, x), scale.new_empty(scale.shape if needs_scale else 0)


def _modulated_backward(grad_out, x, scale, needs_x, needs_scale, impl):
    grads = _empty_modulated_backward(grad_out, x, scale, needs_x, needs_scale, impl)
    wanted = [g if needed else None for g, needed in zip(grads, (needs_x, needs_scale), strict=True)]
    _backend(impl).modulated_silu_backward(grad_out, x, scale, *wanted)
    return grads


modulated_silu = _library.define(
    "modulated_silu(Tensor x, Tensor scale, str impl) -> Tensor",
    _modulated,
    lambda x, scale, impl: torch.empty_like(x),
)
modulated_silu_bwd = _library.define(
    "modulated_silu_bwd(Tensor grad_out, Tensor x, Tensor scale, bool needs_x, bool needs_scale, str impl) "
    "-> (Tensor, Tensor)",
    _modulated_backward,
    _empty_modulated_backward,
)


def _modulated_context(ctx, inputs, output) -> None:
    x, scale, ctx.impl = inputs
    ctx.save_for_backward(x, scale)


def _modulated_gradient(ctx, grad_out):
    needs = ctx.needs_input_grad[:2]
    grads = modulated_silu_bwd(grad_out, *ctx.saved_tensors, *needs, ctx.impl)
    return (*[g if needed else None for g, needed in zip(grads, needs, strict=True)], None)


_library.register_autograd(modulated_silu, _modulated_gradient, _modulated_context)


def _sum_tensor(a, b, t, impl):
    out = torch.empty_like(a)
    _backend(impl).mp_sum_tensor(a, b, t, out)
    return out


def _empty_sum_tensor_backward(grad_out, a, b, t, needs_a, needs_b, needs_t, impl):
    return empty_if(needs_a, a), empty_if(needs_b, b), empty_if(needs_t, t)


def _sum_tensor_backward(grad_out, a, b, t, needs_a, needs_b, needs_t, impl):
    needs = (needs_a, needs_b, needs_t)
    grads = _empty_sum_tensor_backward(grad_out, a, b, t, *needs, impl)
    wanted = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
    _backend(impl).mp_sum_tensor_backward(grad_out, a, b, t, *wanted)
    return grads


mp_sum_tensor = _library.define(
    "mp_sum_tensor(Tensor a, Tensor b, Tensor t, str impl) -> Tensor",
    _sum_tensor,
    lambda a, b, t, impl: torch.empty_like(a),
)
mp_sum_tensor_bwd = _library.define(
    "mp_sum_tensor_bwd(Tensor grad_out, Tensor a, Tensor b, Tensor t, bool needs_a, bool needs_b, bool needs_t, "
    "str impl) -> (Tensor, Tensor, Tensor)",
    _sum_tensor_backward,
    _empty_sum_tensor_backward,
)


def _sum_tensor_context(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _sum_tensor_gradient(ctx, grad_out):
    needs = ctx.needs_input_grad[:3]
    grads = mp_sum_tensor_bwd(grad_out, *ctx.saved_tensors, *needs, ctx.impl)
    return (*[g if needed else None for g, needed in zip(grads, needs, strict=True)], None)


_library.register_autograd(mp_sum_tensor, _sum_tensor_gradient, _sum_tensor_context, name="mp_sum")


def _empty_cat(a, b, dim, weight_a, weight_b, impl):
    shape = list(a.shape)
    shape[dim] = a.shape[dim] + b.shape[dim]
    return torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=_memory_format(a, b))


def _memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """Channels-last if one of the tensors is that and nothing else, as torch.cat has it."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensors[0].ndim)
    if channels_last is not None:
        for x in tensors:
            if x.is_contiguous(memory_format=channels_last) and not x.is_contiguous():
                return channels_last
    return torch.contiguous_format


def _cat(a, b, dim, weight_a, weight_b, impl):
    out = _empty_cat(a, b, dim, weight_a, weight_b, impl)
    _backend(impl).mp_cat(a, b, dim, weight_a, weight_b, out)
    return out


def _empty_cat_backward(grad_out, size_a, dim, weight_a, weight_b, impl):
    parts = grad_out.narrow(dim, 0, size_a), grad_out.narrow(dim, size_a, grad_out.shape[dim] - size_a)
    return tuple(
        torch.empty(p.shape, dtype=p.dtype, device=p.device, memory_format=_memory_format(grad_out)) for p in parts
    )


def _cat_backward(grad_out, size_a, dim, weight_a, weight_b, impl):
    grads = _empty_cat_backward(grad_out, size_a, dim, weight_a, weight_b, impl)
    _backend(impl).mp_cat_backward(grad_out, dim, weight_a, weight_b, *grads)
    return grads


mp_cat = _library.define(
    "mp_cat(Tensor a, Tensor b, int dim, float weight_a, float weight_b, str impl) -> Tensor",
    _cat,
    _empty_cat,
)
mp_cat_bwd = _library.define(
    "mp_cat_bwd(Tensor grad_out, SymInt size_a, int dim, float weight_a, float weight_b, str impl) -> (Tensor, Tensor)",
    _cat_backward,
    _empty_cat_backward,
)


def _cat_context(ctx, inputs, output) -> None:
    a, _, ctx.dim, *ctx.options = inputs
    ctx.size_a = a.shape[ctx.dim]


def _cat_gradient(ctx, grad_out):
    return (*mp_cat_bwd(grad_out, ctx.size_a, ctx.dim, *ctx.options), None, None, None, None)


_library.register_autograd(mp_cat, _cat_gradient, _cat_context)


def _empty_norm(x, dim, eps, impl):
    return torch.empty_like(x), rms_like(x, [dim])


def _norm(x, dim, eps, impl):
    out, rms = _empty_norm(x, dim, eps, impl)
    _backend(impl).pixel_norm(x, dim, eps, out, rms)
    return out, rms


def _norm_backward(grad_out, out, rms, dim, eps, impl):
    grad_x = torch.empty_like(out)
    _backend(impl).pixel_norm_backward(grad_out, out, rms, dim, eps, grad_x)
    return grad_x


pixel_norm = _library.define(
    "pixel_norm(Tensor x, int dim, float eps, str impl) -> (Tensor, Tensor)", _norm, _empty_norm
)
pixel_norm_bwd = _library.define(
    "pixel_norm_bwd(Tensor grad_out, Tensor out, Tensor rms, int dim, float eps, str impl) -> Tensor",
    _norm_backward,
    lambda grad_out, out, rms, dim, eps, impl: torch.empty_like(out),
)


def _norm_context(ctx, inputs, output) -> None:
    _, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a launch fills zeros for the rms
    ctx.save_for_backward(*output)


def _norm_gradient(ctx, grad_out, _):
    grad_x = None if grad_out is None else pixel_norm_bwd(grad_out, *ctx.saved_tensors, *ctx.options)
    return grad_x, None, None, None


_library.register_autograd(pixel_norm, _norm_gradient, _norm_context)


def _empty_norm_silu(x, dim, eps, impl):
    return torch.empty_like(x), torch.empty_like(x), rms_like(x, [dim])


def _norm_silu(x, dim, eps, impl):
    out, act, rms = _empty_norm_silu(x, dim, eps, impl)
    _backend(impl).pixel_norm(x, dim, eps, out, rms, act)
    return out, act, rms


def _norm_silu_backward(grad_out, grad_act, out, rms, dim, eps, impl):
    grad_x = torch.empty_like(out)
    _backend(impl).pixel_norm_backward(grad_out, out, rms, dim, eps, grad_x, grad_act)
    return grad_x


pixel_norm_silu = _library.define(
    "pixel_norm_silu(Tensor x, int dim, float eps, str impl) -> (Tensor, Tensor, Tensor)", _norm_silu, _empty_norm_silu
)
pixel_norm_silu_bwd = _library.define(
    "pixel_norm_silu_bwd(Tensor grad_out, Tensor grad_act, Tensor out, Tensor rms, int dim, float eps, str impl) "
    "-> Tensor",
    _norm_silu_backward,
    lambda grad_out, grad_act, out, rms, dim, eps, impl: torch.empty_like(out),
)


def _norm_silu_context(ctx, inputs, output) -> None:
    _, *ctx.options = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], output[2])


def _norm_silu_gradient(ctx, grad_out, grad_act, _):
    out, rms = ctx.saved_tensors
    if grad_act is None and grad_out is None:
        return None, None, None, None
    if grad_act is None:
        return pixel_norm_bwd(grad_out, out, rms, *ctx.options), None, None, None
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    return pixel_norm_silu_bwd(grad_out, grad_act, out, rms, *ctx.options), None, None, None


_library.register_autograd(pixel_norm_silu, _norm_silu_gradient, _norm_silu_context)
