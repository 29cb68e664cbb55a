"""Forced weight normalisation by the C++ extension (csrc/weight_norm.cpp, .cu): all weights of a model in one pass."""

from __future__ import annotations

import torch

EPS = 1e-4


def normalize_weights(weights: list[torch.Tensor], copies: list[torch.Tensor], gains: list[float]) -> None:
    """Each weight to unit RMS for each output channel, in place; copies get the weight that forward would use."""
    torch.ops.sae_kernels_native.normalize_weights(weights, copies, gains, EPS)
    # The dispatcher does not see what C++ writes to; caches of effective weights go by the version.
    torch.autograd.graph.increment_version([*weights, *copies])
