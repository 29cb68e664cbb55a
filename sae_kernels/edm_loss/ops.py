"""Registration of edm_loss: schemas, shapes, gradient, and the backend switch.

There is no autocast rule: the op takes the network's output as it comes and computes in fp32 under any autocast dtype.
"""

from __future__ import annotations

import math

import torch

from .. import _extension, _library
from . import composed, cpp

_OPTIONS = "SymInt streams, bool noisy_first, float sigma_data, SymInt seed, SymInt offset, str impl"
# Dimensions of x0 that the extension walks: batch and kMaxDims of csrc/cpu_kernels.h.
MAX_DIMS = 9


def implementations(device: torch.device, ndim: int = 5) -> tuple[list[str], dict[str, str]]:
    """(those that run on this device, fastest first; those that do not, with the reason)."""
    available, why_not = ["composed", "reference"], {"triton": "there is no Triton kernel for this op yet"}
    too_many = f"it takes up to {MAX_DIMS} dimensions, got {ndim}" if ndim > MAX_DIMS else None
    _extension.offer(available, why_not, device, too_many)
    return available, why_not


def _backend(impl: str):
    if impl == "composed":
        return composed
    if impl in ("cpp", "cuda"):
        return cpp
    raise ValueError(f"impl: edm_loss has no registered implementation {impl!r}")


def _empty_forward(model_output, x0, sigma, *options):
    return model_output.new_empty(model_output.shape[:2], dtype=composed.compute_dtype(model_output.dtype))


def _forward(model_output, x0, sigma, *options):
    out = _empty_forward(model_output, x0, sigma)
    if model_output.numel() > 0:
        _backend(options[-1]).forward(model_output, x0, sigma, out, *options[:-1])
    else:
        out.fill_(math.nan)  # the mean of nothing
    return out


def _empty_backward(grad_loss, model_output, x0, sigma, *options):
    return model_output.new_empty(model_output.shape)


def _backward(grad_loss, model_output, x0, sigma, *options):
    grad_output = _empty_backward(grad_loss, model_output, x0, sigma)
    if model_output.numel() > 0:
        _backend(options[-1]).backward(grad_loss, model_output, x0, sigma, grad_output, *options[:-1])
    return grad_output


edm_loss_fwd = _library.define(
    f"edm_loss_fwd(Tensor model_output, Tensor x0, Tensor sigma, {_OPTIONS}) -> Tensor", _forward, _empty_forward
)
edm_loss_bwd = _library.define(
    f"edm_loss_bwd(Tensor grad_loss, Tensor model_output, Tensor x0, Tensor sigma, {_OPTIONS}) -> Tensor",
    _backward,
    _empty_backward,
)


def noise(model_output, x0, streams, noisy_first, seed, offset) -> torch.Tensor:
    """The eps of the noisy frames, fp32, as the reference takes it."""
    shape = (model_output.shape[0], streams * x0.shape[1], *model_output.shape[2:])
    like = model_output.new_empty(0, dtype=torch.float32)
    eps = torch.ops.sae_kernels.token_noise_eps(like, shape, seed, offset, "composed")
    return eps.narrow(1, 0 if noisy_first else x0.shape[1], model_output.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    model_output, x0, sigma, *ctx.options = inputs
    ctx.save_for_backward(model_output, x0, sigma)


def _gradient(ctx, grad_loss):
    return (edm_loss_bwd(grad_loss, *ctx.saved_tensors, *ctx.options), *[None] * 8)


_library.register_autograd(edm_loss_fwd, _gradient, _setup_context)
