"""Numerical error budgets: an implementation may be no worse than eager PyTorch at the same dtype, plus rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def assert_within_budget(
    actual: torch.Tensor,
    gold: torch.Tensor,
    eager: torch.Tensor,
    name: str = "result",
    *,
    roundings: float = 4.0,
    terms: float = 0.0,
) -> None:
    """Hold `actual` to the error of `eager` against `gold`.

    Args:
        actual: result under test, any float dtype.
        gold: the same computation by the reference in fp64, on the promoted low-precision inputs.
        eager: the same computation by the reference at the dtype of `actual`.
        roundings: units in the last place of the largest gold value that are allowed in addition, because another
            order of summation rounds differently without being wrong.
        terms: size of the terms that cancel if the gold result is zero everywhere, up to fp64 rounding; else unused.

    Raises:
        AssertionError: `actual` is not finite, its mean or maximum error exceeds the budget, or its direction differs
            from that of gold.
    """
    assert actual.shape == gold.shape == eager.shape, f"{name}: shape {actual.shape}, expected {gold.shape}"
    assert gold.dtype == torch.float64, f"{name}: gold must be float64, got {gold.dtype}"
    if gold.numel() == 0:
        return
    unit = torch.finfo(actual.dtype).eps
    actual64, eager64, gold = actual.detach().double(), eager.detach().double(), gold.detach()
    if gold.abs().max().item() <= terms * 2.0**-40:
        gold = torch.zeros_like(gold)
    assert torch.isfinite(actual64).all(), f"{name}: not finite"
    error, allowed = (actual64 - gold).abs(), (eager64 - gold).abs()
    largest = gold.abs().max().item() or terms
    for kind, got, base in (
        ("mean", error.mean().item(), allowed.mean().item() + roundings * unit * (gold.abs().mean().item() or terms)),
        ("max", error.max().item(), allowed.max().item() + roundings * unit * largest),
    ):
        if got > base:
            where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            raise AssertionError(
                f"{name}: {kind} error {got:.3e} exceeds the budget {base:.3e} "
                f"(worst at {where}: got {actual64[where]:.6e}, fp64 reference {gold[where]:.6e})"
            )
    if gold.any():
        cosine = torch.nn.functional.cosine_similarity(actual64.flatten(), gold.flatten(), dim=0).item()
        assert cosine > 1 - 16 * unit, f"{name}: cosine with the fp64 reference is {cosine:.6f}"


def noncontiguous(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy of x inside a larger buffer that is NaN elsewhere, with gaps along `dim`."""
    shape = list(x.shape)
    shape[dim] = shape[dim] * 2 + 3
    buffer = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = buffer.narrow(dim, 2, x.shape[dim])
    view.copy_(x)
    return view.detach().requires_grad_(x.requires_grad)


STRIDES = (
    "contiguous",
    "permuted",
    "last dimension outermost",
    "every second",
    "offset by one element",
    "expanded",
    "expanded everywhere",
    "overlapping",
    "odd strides of ones",
)


def strided(shape: Sequence[int], kind: str, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Normals of a shape in memory of one of the kinds in `STRIDES`, with NaN between and around them.

    Expanded and overlapping tensors have fewer elements in memory than in their shape.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, dims = tuple(shape), len(shape)

    def inside(memory: Sequence[int], strides: Sequence[int], offset: int = 0) -> torch.Tensor:
        """A view of `shape` into a buffer that is NaN except in the elements of the view."""
        length = 1 + sum((n - 1) * s for n, s in zip(memory, strides, strict=True)) if 0 not in memory else 0
        buffer = torch.full((length + offset + 8,), float("nan"), dtype=torch.float32)
        view = buffer.as_strided(tuple(memory), tuple(strides), offset)
        values = torch.randn(buffer.shape, generator=generator).as_strided(tuple(memory), tuple(strides), offset)
        view.copy_(values)
        buffer = buffer.to(device, dtype)
        return buffer.as_strided(shape, tuple(0 if m < n else s for m, n, s in zip(memory, shape, strides)), offset)

    def dense(order: Sequence[int], sizes: Sequence[int] = shape) -> list[int]:
        """Strides of a dense tensor whose dimensions lie in memory in this order, slowest first."""
        strides, step = [1] * dims, 1
        for dim in reversed(order):
            strides[dim] = step
            step *= max(sizes[dim], 1)
        return strides

    order = list(range(dims))
    if kind == "permuted":
        order = torch.randperm(dims, generator=generator).tolist()
    elif kind == "last dimension outermost":
        order = order[-1:] + order[:-1]
    strides, memory = dense(order), shape
    if kind == "every second":
        dim = int(torch.randint(dims, (1,), generator=generator)) if dims else 0
        strides = dense(order, [2 * n + 1 if d == dim else n for d, n in enumerate(shape)])
        strides = [2 * s if d == dim else s for d, s in enumerate(strides)]
    elif kind == "expanded" and dims:
        dim = int(torch.randint(dims, (1,), generator=generator))
        memory = tuple(min(n, 1) if d == dim else n for d, n in enumerate(shape))
        strides = dense(order, memory)
    elif kind == "expanded everywhere":
        memory = tuple(min(n, 1) for n in shape)
    elif kind == "overlapping":
        strides = torch.randint(1, 4, (dims,), generator=generator).tolist()
    elif kind == "odd strides of ones":
        strides = [7 * d if n == 1 else s for d, (n, s) in enumerate(zip(shape, strides, strict=True))]
    return inside(memory, strides, 1 if kind == "offset by one element" else 0)
