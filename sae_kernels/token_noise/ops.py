"""Registration of token_noise: schemas, shapes, gradient, and the backend switch.

There is no autocast rule: the ops keep their dtypes and compute in fp32 whatever the autocast dtype.
"""

from __future__ import annotations

import torch

from .. import _extension, _launch, _library
from . import composed, cpp

_OPTIONS = "SymInt seed, SymInt offset, str impl"


# Dimensions of x that the extension supports: batch and kMaxDims of csrc/cpu_kernels.h.
MAX_DIMS = 9


def implementations(
    device: torch.device, ndim: int = 2, dtypes: tuple[torch.dtype, ...] = ()
) -> tuple[list[str], dict[str, str]]:
    """(those that run on this device, fastest first; those that do not, with the reason)."""
    available, why_not = ["composed", "reference"], {}
    reason = _launch.why_not(device)
    if reason is None and torch.float64 in dtypes:
        reason = "it computes in float32; float64 is for the others"
    if reason is not None:
        why_not["triton"] = reason
    else:
        # The interpreter is for tests; "auto" never chooses it.
        available.insert(0 if device.type == "cuda" else len(available), "triton")
    too_many = f"it takes up to {MAX_DIMS} dimensions, got {ndim}" if ndim > MAX_DIMS else None
    _extension.offer(available, why_not, device, too_many)
    return available, why_not


def _backend(impl: str):
    if impl == "composed":
        return composed
    if impl in ("cpp", "cuda"):
        return cpp
    if impl == "triton":
        from . import triton

        return triton
    raise ValueError(f"impl: token_noise has no registered implementation {impl!r}")


def _empty_forward(x, signal_scale, noise_scale, streams, dtype, return_noise, seed, offset, impl):
    shape = (x.shape[0], streams * x.shape[1], *x.shape[2:])
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape if return_noise else (0,), dtype=dtype)


def _forward(x, signal_scale, noise_scale, streams, dtype, return_noise, seed, offset, impl):
    out, noise = _empty_forward(x, signal_scale, noise_scale, streams, dtype, return_noise, seed, offset, impl)
    if out.numel() > 0:
        wanted = noise if return_noise else None
        _backend(impl).forward(x, signal_scale, noise_scale, out, wanted, streams, seed, offset)
    return out, noise


def _empty_backward(grad_out, x, signal_scale, noise_scale, needs_x, needs_signal, needs_noise, seed, offset, impl):
    wanted = ((x, needs_x), (signal_scale, needs_signal), (noise_scale, needs_noise))
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in wanted)


def _backward(grad_out, x, signal_scale, noise_scale, needs_x, needs_signal, needs_noise, seed, offset, impl):
    needs = (needs_x, needs_signal, needs_noise)
    grads = _empty_backward(grad_out, x, signal_scale, noise_scale, *needs, seed, offset, impl)
    wanted = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    if grad_out.numel() > 0:
        _backend(impl).backward(grad_out, x, signal_scale, *wanted, seed, offset)
    else:
        for grad in grads:
            grad.zero_()
    return grads


def _eps(like, shape, seed, offset, impl):
    out = like.new_empty(shape)
    if out.numel() > 0:
        _backend(impl).eps(out, seed, offset)
    return out


token_noise_fwd = _library.define(
    "token_noise_fwd(Tensor x, Tensor signal_scale, Tensor noise_scale, SymInt streams, ScalarType dtype, "
    f"bool return_noise, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _empty_forward,
)
token_noise_bwd = _library.define(
    "token_noise_bwd(Tensor grad_out, Tensor x, Tensor signal_scale, Tensor noise_scale, bool needs_x, "
    f"bool needs_signal, bool needs_noise, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_backward,
)
# `like` gives device and dtype, because the dispatcher needs a tensor to choose by.
token_noise_eps = _library.define(
    f"token_noise_eps(Tensor like, SymInt[] shape, {_OPTIONS}) -> Tensor",
    _eps,
    lambda like, shape, seed, offset, impl: like.new_empty(shape),
)


def _setup_context(ctx, inputs, output) -> None:
    x, signal_scale, noise_scale, _, _, _, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, signal_scale, noise_scale)


def _gradient(ctx, grad_out, grad_noise):
    needs = ctx.needs_input_grad[:3]
    grads = token_noise_bwd(grad_out, *ctx.saved_tensors, *needs, *ctx.options)
    return (*[g if needed else None for g, needed in zip(grads, needs, strict=True)], *[None] * 6)


_library.register_autograd(token_noise_fwd, _gradient, _setup_context, twice=True)


def _backward_context(ctx, inputs, output) -> None:
    grad_out, x, signal_scale, noise_scale, *ctx.options = inputs
    ctx.save_for_backward(grad_out, x, signal_scale, noise_scale)


def _backward_gradient(ctx, for_x, for_signal, for_noise):
    """With G = grad_out and v upstream: the gradient of the sum of G (s v_x + v_s x + v_n eps) over all streams."""
    grad_out, x, signal_scale, noise_scale = ctx.saved_tensors
    *needs, seed, offset, impl = ctx.options
    options = (grad_out.shape[1] // x.shape[1], grad_out.dtype, False, seed, offset, impl)
    needs_grad, needs_x, needs_signal = ctx.needs_input_grad[:3]
    for_x, for_signal, for_noise = (
        v if needed else torch.zeros_like(t)
        for v, needed, t in zip((for_x, for_signal, for_noise), needs, (x, signal_scale, noise_scale), strict=True)
    )
    grad = of_x = of_signal = None
    if needs_grad:
        grad = token_noise_fwd(for_x, signal_scale, torch.zeros_like(noise_scale), *options)[0]
        grad = grad + token_noise_fwd(x, for_signal, for_noise, *options)[0]
    if needs_x:
        of_x = token_noise_bwd(grad_out, x, for_signal, noise_scale, True, False, False, seed, offset, impl)[0]
    if needs_signal:
        of_signal = token_noise_bwd(grad_out, for_x, signal_scale, noise_scale, False, True, False, seed, offset, impl)[
            1
        ]
    return (grad, of_x, of_signal, *[None] * 7)


_library.register_autograd(token_noise_bwd, _backward_gradient, _backward_context, name="token_noise", twice=True)
