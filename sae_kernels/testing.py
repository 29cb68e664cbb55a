"""Numerical error budgets: an implementation may be no worse than eager PyTorch at the same dtype, plus rounding."""

from __future__ import annotations

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
        roundings: how many units in the last place of the largest gold value are granted on top, because
            another summation order is another rounding, not an error.
        terms: size of the terms that cancel where the gold result is zero everywhere; unused otherwise.

    Raises:
        AssertionError: not finite where gold is, mean or max error over budget, or a gradient that is zero
            where the gold one is not.
    """
    assert actual.shape == gold.shape == eager.shape, f"{name}: shape {actual.shape}, expected {gold.shape}"
    assert gold.dtype == torch.float64, f"{name}: gold must be float64, got {gold.dtype}"
    if gold.numel() == 0:
        return
    unit = torch.finfo(actual.dtype).eps
    actual64, eager64 = actual.detach().double(), eager.detach().double()
    gold = gold.detach()
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
    """A copy of x inside a larger NaN-filled buffer: strided along `dim`, poisoned neighbours."""
    shape = list(x.shape)
    shape[dim] = shape[dim] * 2 + 3
    buffer = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = buffer.narrow(dim, 2, x.shape[dim])
    view.copy_(x)
    return view.detach().requires_grad_(x.requires_grad)
