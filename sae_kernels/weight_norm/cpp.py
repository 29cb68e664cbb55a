"""Normalisation of all weights of a model in one pass by the C++ extension (csrc/weight_norm.cpp, .cu)."""

from __future__ import annotations

import torch

EPS = 1e-4


def normalize_weights_(weights: list[torch.Tensor], copies: list[torch.Tensor], gains: list[float]) -> None:
    """Each weight to unit RMS for each output channel, in place; copies get the weight that forward would use."""
    torch.ops.sae_kernels_native.normalize_weights(weights, copies, gains, EPS, True)
    # The dispatcher does not see writes by C++, and caches of effective weights depend on the version.
    torch.autograd.graph.increment_version([*weights, *copies])


def normalize_weights(weights: list[torch.Tensor], outs: list[torch.Tensor], gains: list[float]) -> None:
    torch.ops.sae_kernels_native.normalize_weights(weights, outs, gains, EPS, False)


def normalize_weights_backward(
    grads: list[torch.Tensor], weights: list[torch.Tensor], grad_weights: list[torch.Tensor], gains: list[float]
) -> None:
    grads = [grad.contiguous() for grad in grads]
    torch.ops.sae_kernels_native.normalize_weights_bwd(grads, weights, grad_weights, gains, EPS)
