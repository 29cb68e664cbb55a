"""Registration of qk_prepare: schemas, shapes, gradient, and the backend switch.

There is no autocast rule: the ops keep the dtype of their input and compute in fp32 whatever the autocast dtype.
"""

from __future__ import annotations

import torch

from .. import _extension, _launch, _library
from . import composed, cpp

# positions, or the place of a token: frames = 0 where there is no layout; no axes: nothing is turned.
_OPTIONS = (
    "SymInt frames, SymInt tokens_per_frame, SymInt width, SymInt start, SymInt[] axes, float base, bool interleaved, "
    "bool normalize, bool normalize_v, float eps, str impl"
)


def implementations(
    device: torch.device, dtype: torch.dtype = torch.float32, head_dim: int = 64
) -> tuple[list[str], dict[str, str]]:
    """(those that run on this device, fastest first; those that do not, with the reason)."""
    available = ["composed", "reference"]
    why_not: dict[str, str] = {}
    narrow = "it computes in float32; float64 is for composed and reference" if dtype == torch.float64 else None
    _extension.offer_on_cpu(available, why_not, device, narrow)
    reason = _launch.why_not(device) or narrow
    if reason is None and head_dim > 1024:
        reason = "it holds head dims up to 1024"
    if reason is not None:
        why_not["triton"] = reason
    else:
        # The interpreter serves tests: never the choice of "auto".
        available.insert(0 if device.type == "cuda" else len(available), "triton")
    return available, why_not


def _backend(impl: str):
    if impl == "composed":
        return composed
    if impl == "cpp":
        return cpp
    if impl == "triton":
        from . import triton

        return triton
    raise ValueError(f"impl: qk_prepare has no registered implementation {impl!r}")


def heads_inside(x: torch.Tensor) -> bool:
    """Whether (B, H, S, D) lies in memory as (B, S, H, D): outputs and gradients then do so too."""
    return x.stride(1) < x.stride(2)


def _empty(like: torch.Tensor, heads: int, length: int, inside: bool) -> torch.Tensor:
    B, D = like.shape[0], like.shape[-1]
    return like.new_empty((B, length, heads, D)).transpose(1, 2) if inside else like.new_empty((B, heads, length, D))


def _split(x: torch.Tensor, heads: list[int]) -> list[torch.Tensor]:
    starts = (0, heads[0], heads[0] + heads[1])
    return [x.narrow(1, start, count) for start, count in zip(starts, heads, strict=True)]


def _rms_of_parts(rms: torch.Tensor, heads: list[int], normalized: list[bool]) -> list[torch.Tensor | None]:
    """rms (B, normalised heads, S), cut into those of each part."""
    found, start = [], 0
    for count, wanted in zip(heads, normalized, strict=True):
        found.append(rms.narrow(1, start, count) if wanted else None)
        start += count if wanted else 0
    return found


def _empty_forward(q, k, v, positions, heads, *options):
    *_, normalize, normalize_v, _, _ = options
    B, _, S, _ = q.shape
    # Without a v in separate tensors there is an empty third output.
    outs = tuple(_empty(q, count, S, heads_inside(q)) for count in heads[:2])
    outs += (_empty(q, heads[2], S, heads_inside(q)) if k is None or v is not None else q.new_empty(0),)
    count = sum(n for n, wanted in zip(heads, (normalize, normalize, normalize_v), strict=True) if wanted)
    return *outs, q.new_empty((B, count, S), dtype=composed.compute_dtype(q.dtype))


def _forward(q, k, v, positions, heads, *options):
    *place_and_turn, normalize, normalize_v, eps, impl = options
    *outs, rms = _empty_forward(q, k, v, positions, heads, *options)
    parts = _split(q, heads) if k is None else [t for t in (q, k, v) if t is not None]
    count = len(parts)
    if outs[0].numel() > 0:
        normalized = [normalize, normalize, normalize_v][:count]
        rms_of = _rms_of_parts(rms, [p.shape[1] for p in parts], normalized)
        frames, tokens_per_frame, width, start, *turn = place_and_turn
        place = (frames, tokens_per_frame, width, start)
        _backend(impl).forward(parts, outs[:count], rms_of, positions, place, *turn, eps)
    return *outs, rms


def _empty_backward(grad_q, grad_k, grad_v, q, k, v, rms, positions, packed, inside, *options):
    grads, S = (grad_q, grad_k, grad_v), grad_q.shape[2]
    if packed:
        whole = _empty(grad_q, sum(g.shape[1] for g in grads), S, inside)
        return whole, grad_q.new_empty(0), grad_q.new_empty(0)
    return tuple(g.new_empty(0) if g.ndim == 1 else _empty(g, g.shape[1], S, inside) for g in grads)


def _backward(grad_q, grad_k, grad_v, q, k, v, rms, positions, packed, inside, *options):
    *place_and_turn, normalize, normalize_v, eps, impl = options
    results = _empty_backward(grad_q, grad_k, grad_v, q, k, v, rms, positions, packed, inside, *options)
    count = 2 if grad_v.ndim == 1 else 3
    grads = [grad_q, grad_k, grad_v][:count]
    heads = [g.shape[1] for g in grads]
    parts = _split(results[0], heads) if packed else list(results[:count])
    if grad_q.numel() > 0:
        rms_of = _rms_of_parts(rms, heads, [normalize, normalize, normalize_v][:count])
        frames, tokens_per_frame, width, start, *turn = place_and_turn
        place = (frames, tokens_per_frame, width, start)
        _backend(impl).backward(grads, [q, k, v][:count], rms_of, parts, positions, place, *turn, eps)
    return results


# Packed heads come as q alone, with `heads` saying how many are of q, k and v.
qk_prepare_fwd = _library.define(
    f"qk_prepare_fwd(Tensor q, Tensor? k, Tensor? v, Tensor? positions, SymInt[] heads, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_forward,
)
# q, k, v are the outputs of forward where those were normalised.
qk_prepare_bwd = _library.define(
    "qk_prepare_bwd(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor? q, Tensor? k, Tensor? v, Tensor rms, "
    f"Tensor? positions, bool packed, bool heads_inside, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, positions, _, *ctx.options = inputs
    *outs, rms = output
    ctx.packed, ctx.inside = k is None, heads_inside(q)
    ctx.has = (True, k is not None, v is not None)
    *_, normalize, normalize_v, _, _ = ctx.options
    ctx.mark_non_differentiable(rms)
    kept = [out if wanted else None for out, wanted in zip(outs, (normalize, normalize, normalize_v), strict=True)]
    ctx.save_for_backward(*kept, rms, positions)


def _gradient(ctx, grad_q, grad_k, grad_v, _):
    grads = qk_prepare_bwd(grad_q, grad_k, grad_v, *ctx.saved_tensors, ctx.packed, ctx.inside, *ctx.options)
    return (*[g if has else None for g, has in zip(grads, ctx.has, strict=True)], None, None, *[None] * 11)


_library.register_autograd(qk_prepare_fwd, _gradient, _setup_context)
