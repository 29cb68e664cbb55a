"""The specification of weight normalisation; equation numbers of EDM2 (Karras et al. 2024).

Any float dtype, differentiable by autograd.
"""

from __future__ import annotations

import math

import torch

from .._tensors import compute_dtype


def normalize_weight(w: torch.Tensor, gain: float | torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Eqs. 47 and 66: output channels (dim 0) of unit RMS, then gain / sqrt(fan-in); of the dtype of w by default."""
    fan_in = math.prod(w.shape[1:])
    if isinstance(gain, torch.Tensor):
        gain = gain.to(compute_dtype(w.dtype))
    dims = list(range(1, w.ndim))
    norm = torch.linalg.vector_norm(w, dim=dims, keepdim=True, dtype=compute_dtype(w.dtype))
    unit = w / (1e-4 + norm / math.sqrt(fan_in))
    return (unit * (gain / math.sqrt(fan_in))).to(dtype or w.dtype)
