"""Inputs and comparisons shared by the tests of frame_attention's kernels."""

from __future__ import annotations

import torch

from sae_kernels import FrameLayout
from sae_kernels._launch import architecture, run
from sae_kernels.frame_attention import reference
from sae_kernels.testing import assert_within_budget, noncontiguous

NAMES = ("out", "dq", "dk", "dv")
STRIDES = ("bhsd", "bshd", "packed", "poisoned", "sliced head")


def make(layout, *, heads=(1, 1), D=16, B=1, dtype=torch.float32, noisy_queries_only=False, seed=0):
    """[q, k, v, grad of out]."""
    generator = torch.Generator().manual_seed(seed)
    S = layout.sequence_length
    rows = S - layout.frames * layout.tokens_per_frame if noisy_queries_only else S
    shapes = ((B, heads[0], rows, D), (B, heads[1], S, D), (B, heads[1], S, D), (B, heads[0], rows, D))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def restride(tensors, strides: str):
    """The same values in other strides, all with a contiguous last dimension."""
    if strides == "bshd":
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    if strides == "packed":
        # One (B, S, heads, D) buffer holds q, k and v side by side, as a fused projection leaves them.
        q, k, v, grad = tensors
        if q.shape[2] == k.shape[2]:
            parts = torch.cat([x.transpose(1, 2) for x in (q, k, v)], dim=2).split(
                [x.shape[1] for x in (q, k, v)], dim=2
            )
            q, k, v = (x.transpose(1, 2) for x in parts)
        return [q, k, v, grad]
    if strides == "poisoned":
        return [noncontiguous(x, 2) for x in tensors]
    if strides == "sliced head":
        # Row strides that no vector width divides.
        return [torch.nn.functional.pad(x, (0, 3), value=float("nan"))[..., : x.shape[-1]] for x in tensors]
    return tensors


def specification(tensors, layout: FrameLayout, scale: float, noisy_queries_only: bool):
    """([out, dq, dk, dv], lse) by the reference, at the dtype of the tensors."""
    *inputs, grad = (x.detach().clone() for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    out, lse = reference.frame_attention(*inputs, layout, scale, noisy_queries_only)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)], lse


def launch(kernels, tensors, layout: FrameLayout, scale: float, noisy_queries_only: bool, config=None):
    """([out, dq, dk, dv], lse) by the launches that a package of kernels plans, with one tile size or its own."""
    q, k, v, grad = (x.detach() for x in tensors)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    options = (layout, scale, noisy_queries_only, architecture(q.device))
    run(kernels.plan_forward(q, k, v, out, lse, *options, config), q.device)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    given = kernels.Gradients(grad, q, k, v, out, lse, torch.empty_like(lse), *grads)
    run(kernels.plan_backward(given, *options, (None, config, config)), q.device)
    return [out, *grads], lse


def compare(actual, lse, tensors, layout: FrameLayout, scale: float, noisy_queries_only: bool) -> None:
    """Hold results to the budget against the reference in fp64 on the same low-precision inputs."""
    dtype = tensors[0].dtype
    gold, gold_lse = specification([x.double() for x in tensors], layout, scale, noisy_queries_only)
    eager, _ = specification(tensors, layout, scale, noisy_queries_only)
    q, k, v, grad = tensors
    # dq = scale sum p (dp - delta) k: terms of this size cancel to zero where every row sees one key.
    terms = (grad.norm(dim=-1).max() * v.norm(dim=-1).max() * torch.maximum(q.abs().max(), k.abs().max())).item()
    # Probabilities come back as exp2(scores - lse): lse is rounded once when stored and once when turned to base 2.
    lse_ulps = 2 * gold_lse.abs().max().item() * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    for name, *results in zip(NAMES, actual, gold, eager, strict=True):
        assert_within_budget(*results, f"{name} of {layout}", terms=terms * abs(scale), roundings=4 + lse_ulps)
    torch.testing.assert_close(lse.double(), gold_lse, rtol=1e-6, atol=2e-6)
