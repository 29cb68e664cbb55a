"""Registration of weight normalisation: schemas, shapes, gradients, and the backend switch.

There is no autocast rule: the ops keep the dtype of their input and compute in fp32 whatever the autocast dtype.
Outputs have the memory order of their weight; those of a list are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _extension, _launch, _library
from .._tensors import empty_if, rms_like
from . import composed, cpp


def implementations(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[list[str], dict[str, str]]:
    """(those of normalize_weight that run on this device, fastest first; those that do not, with the reason)."""
    available = ["composed", "reference"]
    why_not = dict.fromkeys(
        ("cpp", "cuda"), "the C++ extension has code for normalize_weights and normalize_weights_ alone"
    )
    reason = _launch.why_not(device)
    if reason is None and dtype == torch.float64:
        reason = "it computes in float32; float64 is for composed and reference"
    if reason is not None:
        why_not["triton"] = reason
    else:
        # The interpreter is for tests; "auto" never chooses it.
        available.insert(0 if device.type == "cuda" else len(available), "triton")
    return available, why_not


def _backend(impl: str):
    if impl == "composed":
        return composed
    if impl == "triton":
        from . import triton

        return triton
    raise ValueError(f"impl: normalize_weight has no registered implementation {impl!r}")


def _empty_weight(w, gain, factor, impl):
    return torch.empty_like(w), rms_like(w, list(range(1, w.ndim)))


def _weight(w, gain, factor, impl):
    out, rms = _empty_weight(w, gain, factor, impl)
    _backend(impl).normalize_weight(w, gain, factor, out, rms)
    return out, rms


def _empty_weight_backward(grad_out, w, gain, factor, rms, needs_w, needs_gain, impl):
    return empty_if(needs_w, w), torch.empty_like(gain) if needs_gain else w.new_empty(0)


def _weight_backward(grad_out, w, gain, factor, rms, needs_w, needs_gain, impl):
    grads = _empty_weight_backward(grad_out, w, gain, factor, rms, needs_w, needs_gain, impl)
    wanted = [g if needed else None for g, needed in zip(grads, (needs_w, needs_gain), strict=True)]
    _backend(impl).normalize_weight_backward(grad_out, w, gain, factor, rms, *wanted)
    return grads


normalize_weight = _library.define(
    "normalize_weight(Tensor w, Tensor? gain, float factor, str impl) -> (Tensor, Tensor)",
    _weight,
    _empty_weight,
)
normalize_weight_bwd = _library.define(
    "normalize_weight_bwd(Tensor grad_out, Tensor w, Tensor? gain, float factor, Tensor rms, bool needs_w, "
    "bool needs_gain, str impl) -> (Tensor, Tensor)",
    _weight_backward,
    _empty_weight_backward,
)


def _weight_context(ctx, inputs, output) -> None:
    w, gain, ctx.factor, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(w, gain, output[1])


def _weight_gradient(ctx, grad_out, _):
    if grad_out is None:
        return None, None, None, None
    w, gain, rms = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grads = normalize_weight_bwd(grad_out, w, gain, ctx.factor, rms, *needs, ctx.impl)
    return (*[g if needed else None for g, needed in zip(grads, needs, strict=True)], None, None)


_library.register_autograd(normalize_weight, _weight_gradient, _weight_context)


def weight_implementations(weights: Sequence[torch.Tensor], in_place: bool = False) -> tuple[list[str], dict[str, str]]:
    """(those that normalise a list of weights, fastest first; those that do not, with the reason)."""
    fits = all(w.dtype == torch.float32 and w.is_contiguous() for w in weights)
    available = ["composed"] if in_place else ["composed", "reference"]
    why_not = {"triton": "there is no Triton kernel for this op; use cpp, cuda or composed"}
    _extension.offer(available, why_not, weights[0].device, None if fits else "it takes contiguous float32 weights")
    return available, why_not


def _weight_backend(impl: str):
    return composed if impl == "composed" else cpp


def _normalize_in_place(weights, copies, gains, impl):
    """A tensor that appears again, such as a tied weight, is written once; its further copies are made after that."""
    first: dict[tuple, int] = {}
    again = []
    for i, w in enumerate(weights):
        earlier = first.setdefault(_identity(w), i)
        differs = copies and (_identity(copies[i]), gains[i]) != (_identity(copies[earlier]), gains[earlier])
        if earlier != i and differs:
            again.append(i)
    once = list(first.values())
    named = [(f"weights[{i}]", weights[i]) for i in once]
    if copies:
        named += [(f"copies[{i}]", copies[i]) for i in sorted(once + again)]
    _check_no_shared_memory(named)

    backend = _weight_backend(impl)
    if copies:
        backend.normalize_weights_(*([given[i] for i in once] for given in (weights, copies, gains)))
    else:
        backend.normalize_weights_([weights[i] for i in once], [], [])
    for i in again:
        made = torch.empty_like(copies[i])
        backend.normalize_weights([weights[i]], [made], [gains[i]])
        copies[i].copy_(made)


def _identity(x: torch.Tensor) -> tuple:
    """A key that is equal for two references to one tensor."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.dtype, x.shape, x.stride()


def _check_no_shared_memory(named: list[tuple[str, torch.Tensor]]) -> None:
    """Check that each byte belongs to one element only, because threads write these tensors concurrently."""
    reach = []
    for name, x in named:
        start = x.data_ptr()
        if start != 0:  # neither empty nor meta
            last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            reach.append((start, start + (last + 1) * x.element_size(), name, x))
            if not x.is_contiguous() and _addresses(x).unique().numel() < x.numel() * x.element_size():
                raise ValueError(f"{name}: must not overlap itself, got strides {x.stride()} of {tuple(x.shape)}")
    reach.sort(key=lambda entry: entry[:2])
    near: list[tuple[int, int, str, torch.Tensor]] = []
    for start, end, name, x in reach:
        near = [entry for entry in near if entry[1] > start]
        for _, _, other, y in near:
            if torch.isin(_addresses(x), _addresses(y)).any():
                raise ValueError(f"{other}, {name}: must not share memory unless they are the same weight")
        near.append((start, end, name, x))


def _addresses(x: torch.Tensor) -> torch.Tensor:
    """Addresses of all bytes of a tensor, on the CPU."""
    size = x.element_size()
    found = torch.tensor([x.data_ptr()])
    for n, stride in (*((n, stride * size) for n, stride in zip(x.shape, x.stride(), strict=True)), (size, 1)):
        found = (found[:, None] + stride * torch.arange(n)).flatten()
    return found


normalize_weights_ = _library.define(
    "normalize_weights_(Tensor(a!)[] weights, Tensor(b!)[] copies, float[] gains, str impl) -> ()",
    _normalize_in_place,
    lambda weights, copies, gains, impl: None,
)


def _empty_weights(weights, gains, dtype, impl):
    return [torch.empty(w.shape, dtype=dtype or w.dtype, device=w.device) for w in weights]


def _weights(weights, gains, dtype, impl):
    outs = _empty_weights(weights, gains, dtype, impl)
    _weight_backend(impl).normalize_weights(weights, outs, gains)
    return outs


def _empty_weights_backward(grads, weights, gains, impl):
    return [torch.empty_like(w) for w in weights]


def _weights_backward(grads, weights, gains, impl):
    grad_weights = _empty_weights_backward(grads, weights, gains, impl)
    _weight_backend(impl).normalize_weights_backward(grads, weights, grad_weights, gains)
    return grad_weights


normalize_weights = _library.define(
    "normalize_weights(Tensor[] weights, float[] gains, ScalarType? dtype, str impl) -> Tensor[]",
    _weights,
    _empty_weights,
)
normalize_weights_bwd = _library.define(
    "normalize_weights_bwd(Tensor[] grads, Tensor[] weights, float[] gains, str impl) -> Tensor[]",
    _weights_backward,
    _empty_weights_backward,
)


def _weights_context(ctx, inputs, output) -> None:
    weights, ctx.gains, _, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*weights)


def _weights_gradient(ctx, grads):
    """One launch for all weights; a weight whose copy was not used gets no gradient."""
    found: list[torch.Tensor | None] = [None] * len(ctx.gains)
    used = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[0][i]]
    if used:
        weights = ctx.saved_tensors
        args = ([grads[i] for i in used], [weights[i] for i in used], [ctx.gains[i] for i in used])
        for i, grad in zip(used, normalize_weights_bwd(*args, ctx.impl), strict=True):
            found[i] = grad
    return found, None, None, None


_library.register_autograd(normalize_weights, _weights_gradient, _weights_context)
