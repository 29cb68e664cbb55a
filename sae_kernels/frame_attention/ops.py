"""Registration of frame_attention: schemas, shapes, gradient and autocast rules, and the backend switch."""

from __future__ import annotations

import torch

from .. import _extension, _launch, _library
from ..layout import FrameLayout
from . import composed, cpp

# The fields of FrameLayout, in their order.
_LAYOUT = (
    "SymInt frames, SymInt tokens_per_frame, SymInt frames_per_block, SymInt noisy_copies, bool noisy_first, "
    "SymInt? window, SymInt sink"
)
_OPTIONS = f"{_LAYOUT}, float scale, bool noisy_queries_only, str impl"


def implementations(
    device: torch.device, dtype: torch.dtype = torch.float32, head_dim: int = 64
) -> tuple[list[str], dict[str, str]]:
    """(those that run on this device, fastest first; those that do not, with the reason)."""
    available = ["composed", "reference"]
    why_not: dict[str, str] = {}
    narrow = "it computes in float32; float64 is for composed and reference" if dtype == torch.float64 else None
    _extension.offer_on_cpu(available, why_not, device, narrow)
    reason = _launch.why_not(device)
    if reason is None and narrow is not None:
        reason = narrow
    elif reason is None and head_dim > 256:
        reason = "it holds head dims up to 256"
    if reason is not None:
        why_not["triton"] = reason
    elif device.type == "cuda":
        available.insert(0, "triton")
    else:
        # The interpreter is for tests; "auto" never chooses it.
        available.append("triton")
    return available, why_not


def _backend(impl: str):
    if impl == "composed":
        return composed
    if impl == "cpp":
        return cpp
    if impl == "triton":
        from . import triton

        return triton
    raise ValueError(f"impl: frame_attention has no registered implementation {impl!r}")


def _forward(q, k, v, *options):
    *layout, scale, noisy_queries_only, impl = options
    out, lse = _empty_forward(q)
    if out.numel() > 0:
        q, k, v = map(_in_rows, (q, k, v))
        _backend(impl).forward(q, k, v, out, lse, FrameLayout(*layout), scale, noisy_queries_only)
    return out, lse


def _backward(grad_out, q, k, v, out, lse, *options):
    *layout, scale, noisy_queries_only, impl = options
    grads = _empty_backward(q, k, v)
    if q.numel() == 0:
        for grad in grads:
            grad.zero_()
    else:
        grad_out, q, k, v = map(_in_rows, (grad_out, q, k, v))
        options = (FrameLayout(*layout), scale, noisy_queries_only)
        _backend(impl).backward(grad_out, q, k, v, out, lse, *grads, *options)
    return grads


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """x if the channels of each token are contiguous and do not overlap those of the next one, else a copy."""
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) >= x.shape[3] else x.contiguous()


def _empty_rows(like: torch.Tensor) -> torch.Tensor:
    """An empty tensor in the memory order of `like`, but with contiguous channels."""
    made = torch.empty_like(like)
    return made if made.stride(3) == 1 else like.new_empty(like.shape)


def _empty_forward(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _empty_rows(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _empty_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(_empty_rows(t) for t in (q, k, v))


frame_attention_fwd = _library.define(
    f"frame_attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, *options: _empty_forward(q),
)
frame_attention_bwd = _library.define(
    f"frame_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda grad_out, q, k, v, *rest: _empty_backward(q, k, v),
)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _gradient(ctx, grad_out, grad_lse):
    grads = frame_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * len(ctx.options))


_library.register_autograd(frame_attention_fwd, _gradient, _setup_context)
_library.register_autocast(frame_attention_fwd)
