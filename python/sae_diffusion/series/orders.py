"""Names of generated series and of the orders of their links; imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from ..checks import check_value

CHAINS = ("logistic", "stochastic", "one-minus-x")
Kind = Literal["logistic", "stochastic", "one-minus-x", "mixture", "white-noise"]
Order = Literal["natural", "backward", "swaps", "block-shuffle", "shuffled"]


def check_order(order: str, length: int, step: int) -> None:
    """Raise a ValueError if `data.permutation` does not know the order."""
    check_value("order", order, Order)
    if length < 2:
        raise ValueError(f"length: must be at least 2, got {length}")
    if not 1 <= step <= length:
        raise ValueError(f"step: must be in [1, {length}], got {step}")
    if order == "block-shuffle" and length % step:
        raise ValueError(f"step: must divide the length {length} for block-shuffle, got {step}")
