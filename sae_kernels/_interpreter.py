"""Corrections to Triton's CPU interpreter (3.6 to 3.9), without which bfloat16 kernels compute nonsense in it.

It keeps bfloat16 as uint16: `tl.dot` then multiplies the bit patterns as integers, and a cast from float32 drops the
low bits where a GPU rounds to nearest even. It also patches the language again at every call of a device function,
which takes half of its time; once for each module and launch is enough.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.cache
def correct() -> None:
    """Patch the interpreter once; only interpreted kernels are affected."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle_type = interpreter.InterpreterBuilder, interpreter.TensorHandle
    create_dot, cast_impl, patch_lang = builder.create_dot, builder.cast_impl, interpreter._patch_lang

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return handle_type((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return handle_type(round_to_bfloat16(src.data), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    patched = set()

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        scope = patch_lang(fn)
        # Triton 3.6 calls int() on an array of one element, which NumPy no longer allows.
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        restore = scope.restore

        def restore_all():
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    builder.create_dot, builder.cast_impl, interpreter._patch_lang = dot, cast, patch_once


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(x), quiet, rounded)
