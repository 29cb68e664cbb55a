"""Two corrections to Triton's CPU interpreter, without which bfloat16 kernels compute nonsense in it.

The interpreter (3.6 to 3.9) keeps bfloat16 as uint16: `tl.dot` then multiplies the bit patterns as integers, and a cast
from float32 drops the low bits where a GPU rounds to nearest even.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.cache
def correct() -> None:
    """Patch the interpreter's builder once; only interpreted kernels are affected."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(round_to_bfloat16(src.data), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits (uint16), to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(x), quiet, rounded)
