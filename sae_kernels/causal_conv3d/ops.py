"""Registration of causal_conv3d: schemas, shapes, gradient and autocast rules, and the backend switch."""

from __future__ import annotations

import torch

from .. import _extension, _launch, _library
from ..layout import FrameLayout
from . import composed, configs, cpp

_TENSORS = "Tensor x, Tensor weight, Tensor? past_scale, Tensor? last_scale, Tensor? history"
_GEOMETRY = "float pad_value, SymInt frames, SymInt frames_per_block, SymInt noisy_copies, bool noisy_first"


_OWN_PAST = "noisy frames of a block of several read their own copy, each stream a past of its own; use composed"


def implementations(
    device: torch.device, dtype: torch.dtype = torch.float32, frames_per_block: int = 1, noisy_copies: int = 1
) -> tuple[list[str], dict[str, str]]:
    """(those that run on this device, fastest first; those that do not, with the reason)."""
    available = ["composed", "reference"]
    why_not: dict[str, str] = {}
    own_past = frames_per_block > 1 and noisy_copies > 0
    if device.type == "cpu":
        narrow = None if dtype == torch.float32 else "it computes in float32 alone; use composed"
        _extension.offer(available, why_not, device, narrow or (_OWN_PAST if own_past else None))
    else:
        why_not["cpp"] = "it runs on the CPU; here use triton or composed"
    why_not["cuda"] = "there is no CUDA C++ kernel for this op; use triton or composed"
    reason = _launch.why_not(device)
    if reason is None and dtype == torch.float64:
        reason = "it computes in float32; float64 is for composed and reference"
    elif reason is None and own_past:
        reason = _OWN_PAST
    if reason is not None:
        why_not["triton"] = reason
        return available, why_not
    why_not["triton with frames_per_block > 1"] = _OWN_PAST
    slower = _slower_note(device)
    if slower:
        why_not["triton by itself"] = slower
    # On the CPU it is interpreted, for tests only; "auto" never chooses it there.
    available.insert(0 if device.type == "cuda" else len(available), "triton")
    return available, why_not


@_library.constant_in_graphs
def _slower_note(device: torch.device) -> str:
    """The shapes for which "auto" is composed although the kernels run, according to SAE_KERNELS_CONFIGS."""
    if device.type != "cuda" or not configs.conv_slower():
        return ""
    architecture = _launch.architecture(device)
    maps = ("4 x 4", "8 x 8", "up to 15 x 15", "16 x 16 and more")
    shapes = [
        f"{dtype} {reduced} to {produced} channels, {maps[scale]} pixels ({ratio:.2f}x)"
        for (tuned, dtype, reduced, produced, scale), ratio in configs.conv_slower().items()
        if tuned == architecture
    ]
    return f"measured to be slower than composed, which auto uses, for: {'; '.join(shapes)}" if shapes else ""


def _backend(impl: str, x: torch.Tensor, weight: torch.Tensor):
    """The implementation. If `impl` is "auto", shapes that were measured to be slower than the library go there."""
    if impl == "auto":
        pixels = x.shape[3] * x.shape[4]
        key = configs.conv_key(_launch.architecture(x.device), x.dtype, weight.shape[1], weight.shape[0], pixels)
        impl = "composed" if key in configs.conv_slower() else "triton"
    if impl == "composed":
        return composed
    if impl == "cpp":
        return cpp
    if impl == "triton":
        from . import triton

        return triton
    raise ValueError(f"impl: causal_conv3d has no registered implementation {impl!r}")


def _video(like: torch.Tensor, shape, channels_last: bool = True) -> torch.Tensor:
    memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _empty_forward(x, weight, frames, frames_per_block, noisy_copies, keep_past):
    """(out, past); past has a copy for every stream only where a noisy frame may read its own copy."""
    B, _, F, Y, X = x.shape
    out = _video(x, (B, weight.shape[0], F, Y, X), channels_last=x.stride(1) == 1)
    if not keep_past or weight.shape[2] == 1:
        return out, x.new_empty(0)
    past_frames = F if frames_per_block > 1 and noisy_copies > 0 else frames
    return out, _video(x, (B, weight.shape[0], past_frames, Y, X))


def _forward(
    x, weight, past_scale, last_scale, history,
    pad_value, frames, frames_per_block, noisy_copies, noisy_first, keep_past, impl,
):  # fmt: skip
    if x.numel() == 0:
        return _empty_forward(x, weight, frames, frames_per_block, noisy_copies, keep_past)
    layout = FrameLayout(frames, 1, frames_per_block, noisy_copies, noisy_first)
    out, past = _backend(impl, x, weight).forward(
        x, weight, past_scale, last_scale, history, pad_value, layout, keep_past
    )
    if x.stride(1) != 1:
        out = out.contiguous()
    return out, past if keep_past and past is not None else x.new_empty(0)


def _empty_backward(x, weight, mask):
    """Gradients that are not needed are empty, because an op's arity is fixed."""
    B, _, F, Y, X = x.shape
    past_shape = (B, x.shape[1], weight.shape[2] - 1, Y, X)
    grads = (
        _video(x, x.shape),
        torch.empty_like(weight),
        x.new_empty(B, F),
        x.new_empty(B, F),
        _video(x, past_shape),
    )
    return tuple(grad if asked else x.new_empty(0) for grad, asked in zip(grads, mask))


def _backward(grad_out, x, weight, past_scale, last_scale, history, past, pad_value, *options):
    frames, frames_per_block, noisy_copies, noisy_first, mask, impl = options
    if x.numel() == 0:
        return tuple(grad.zero_() for grad in _empty_backward(x, weight, mask))
    layout = FrameLayout(frames, 1, frames_per_block, noisy_copies, noisy_first)
    past = past if past.numel() > 0 else None
    grads = _backend(impl, x, weight).backward(
        grad_out, x, weight, past_scale, last_scale, history, past, pad_value, layout, mask
    )
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _fake_forward(
    x, weight, past_scale, last_scale, history,
    pad_value, frames, frames_per_block, noisy_copies, noisy_first, keep_past, impl,
):  # fmt: skip
    return _empty_forward(x, weight, frames, frames_per_block, noisy_copies, keep_past)


causal_conv3d_fwd = _library.define(
    f"causal_conv3d_fwd({_TENSORS}, {_GEOMETRY}, bool keep_past, str impl) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
causal_conv3d_bwd = _library.define(
    f"causal_conv3d_bwd(Tensor grad_out, {_TENSORS}, Tensor past, {_GEOMETRY}, bool[] mask, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda grad_out, x, weight, *rest: _empty_backward(x, weight, mask=rest[-2]),
)


def _setup_context(ctx, inputs, output) -> None:
    tensors, (*ctx.options, _keep_past, ctx.impl) = inputs[:5], inputs[5:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _gradient(ctx, grad_out, grad_past):
    mask = list(ctx.needs_input_grad[:5])
    grads = causal_conv3d_bwd(
        grad_out,
        *ctx.saved_tensors,
        *ctx.options,
        mask,
        ctx.impl,
    )
    return (*[grad if asked else None for grad, asked in zip(grads, mask)], *[None] * 7)


_library.register_autograd(causal_conv3d_fwd, _gradient, _setup_context)
_library.register_autocast(causal_conv3d_fwd)


def _empty_past(history: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    shape = (history.shape[0], weight.shape[0], *history.shape[3:])
    return torch.empty(shape, dtype=history.dtype, device=history.device, memory_format=torch.channels_last)


def _past_forward(history, weight, impl):
    if history.numel() == 0:
        return _empty_past(history, weight).zero_()
    return _backend(impl, history, weight).past_term(history, weight)


def _empty_past_backward(history, weight, mask):
    grads = (_video(history, history.shape), torch.empty_like(weight))
    return tuple(grad if asked else history.new_empty(0) for grad, asked in zip(grads, mask))


def _past_backward(grad_out, history, weight, mask, impl):
    if history.numel() == 0:
        return tuple(grad.zero_() for grad in _empty_past_backward(history, weight, mask))
    grads = _backend(impl, history, weight).past_term_backward(grad_out, history, weight, mask)
    return tuple(history.new_empty(0) if grad is None else grad for grad in grads)


causal_conv3d_past_fwd = _library.define(
    "causal_conv3d_past_fwd(Tensor history, Tensor weight, str impl) -> Tensor",
    _past_forward,
    lambda history, weight, impl: _empty_past(history, weight),
)
causal_conv3d_past_bwd = _library.define(
    "causal_conv3d_past_bwd(Tensor grad_out, Tensor history, Tensor weight, bool[] mask, str impl) -> (Tensor, Tensor)",
    _past_backward,
    lambda grad_out, history, weight, mask, impl: _empty_past_backward(history, weight, mask),
)


def _past_setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _past_gradient(ctx, grad_out):
    mask = list(ctx.needs_input_grad[:2])
    grads = causal_conv3d_past_bwd(grad_out, *ctx.saved_tensors, mask, ctx.impl)
    return (*[grad if asked else None for grad, asked in zip(grads, mask)], None)


_library.register_autograd(causal_conv3d_past_fwd, _past_gradient, _past_setup_context, name="past_term")
_library.register_autocast(causal_conv3d_past_fwd)
