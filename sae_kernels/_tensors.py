"""Shared by the composed and Triton implementations of the memory-bound ops: dtypes and memory order."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def up(x: torch.Tensor) -> torch.Tensor:
    # CPU kernels for mixed dtypes are ten times slower than a cast
    return x.to(compute_dtype(x.dtype))


def workspace(out: torch.Tensor) -> torch.Tensor:
    """`out` itself if it can hold the intermediate result, else a tensor of the compute dtype."""
    dtype = compute_dtype(out.dtype)
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def store(work: torch.Tensor, out: torch.Tensor) -> None:
    if work is not out:
        out.copy_(work)


def common_unit(*sizes: int) -> int:
    """The power of two up to 16 that divides all sizes; sizes go to kernels as multiples of it, which is how the
    compiler knows that whole 16-byte accesses stay inside a mask."""
    return min(16, *[n & -n for n in sizes if n] or [16])


def ordered_as(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x in the memory order of the dense `out`, copied only if its order differs."""
    same = all(n == 1 or s == t for n, s, t in zip(x.shape, x.stride(), out.stride(), strict=True))
    return x if same else torch.empty_like(out, dtype=x.dtype).copy_(x)


def empty_if(needed: bool, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like) if needed else like.new_empty(0)


def rms_like(x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    return x.new_empty(shape, dtype=compute_dtype(x.dtype))
