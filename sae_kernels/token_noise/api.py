"""token_noise and token_noise_eps: argument checks and choice of implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import _checks
from ..layout import FrameLayout
from . import ops, reference


def token_noise(
    x: torch.Tensor,
    signal_scale: torch.Tensor | float,
    noise_scale: torch.Tensor | float,
    layout: FrameLayout,
    *,
    seed: int,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    return_noise: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scale a clip and add fresh noise, for the clean and the K noisy streams at once.

    Equal to `signal_scale * torch.cat([x] * layout.streams, dim=1) + noise_scale * eps`, where eps are the normals of
    `token_noise_eps(out.shape, seed=seed, offset=offset)`: Philox4x32-10 (Salmon et al. 2011) on the element's index in
    the contiguous output, then Box-Muller. They depend on nothing else: not on device, strides, dtype, or
    how threads share the work. Sums are computed in fp32 (fp64 for fp64 x) and rounded once. Forward and backward are
    deterministic.

    Args:
        x: (B, T, ...) clean data, any strides; float32, bfloat16, float16 or float64.
        signal_scale, noise_scale: a number, a tensor broadcastable to (B, F) (one value per frame, streams in the order
            of the layout), or one of the rank of x broadcastable to (B, F, ...) (per token, channel or pixel).
        layout: its frames, noisy_copies and noisy_first are used; `tokens_per_frame` is not.
        seed: key of the generator, any signed 64-bit integer.
        offset: counter of the draw, such as the training step, any signed 64-bit integer. Draws of one
            seed with different offsets never share a counter.
        dtype: of the output; that of x by default.
        return_noise: also return eps, of the output's shape and dtype, without gradient.
        impl: "auto", "reference", "composed", "triton", "cpp" (the C++ extension on the CPU) or "cuda" (on CUDA). A
            named one is used or refused, never replaced.

    Returns:
        (B, F, ...), contiguous; with `return_noise` the pair (out, eps). Gradients flow to x and both scales.

    Raises:
        ValueError: a shape, device or value breaks its rule, or `impl` cannot run here.
        TypeError: not a tensor, not an integer, or not a supported dtype.
    """
    if not isinstance(layout, FrameLayout):
        raise TypeError(f"layout: must be a FrameLayout, got {_checks.describe(layout)}")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: must be a tensor of shape (B, T, ...), got {_checks.describe(x)}")
    _checks.check_float("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: must have shape (B, T, ...), got {_checks.describe(x)}")
    _checks.check_size("x", "frames", x.shape[1], "layout.frames", layout.frames)
    dtype = x.dtype if dtype is None else dtype
    _check_dtype(dtype)
    _checks.check_word("seed", seed)
    _checks.check_word("offset", offset)
    shape = (x.shape[0], layout.total_frames, *x.shape[2:])
    signal_scale = _scale("signal_scale", signal_scale, x, shape)
    noise_scale = _scale("noise_scale", noise_scale, x, shape)

    available, why_not = ops.implementations(x.device, x.ndim, (x.dtype, dtype))
    chosen = _checks.choose_implementation("token_noise", impl, x.device, available, why_not)
    if chosen == "reference":
        out, noise = reference.token_noise(x, signal_scale, noise_scale, layout.streams, seed, offset, dtype)
    else:
        out, noise = ops.token_noise_fwd(
            x, signal_scale, noise_scale, layout.streams, dtype, return_noise, seed, offset, chosen
        )
    return (out, noise) if return_noise else out


def token_noise_eps(
    shape: Sequence[int],
    *,
    seed: int,
    offset: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> torch.Tensor:
    """The standard normals that `token_noise` adds to an output of this shape with this seed and offset.

    Computed in fp32, then rounded to `dtype`. Element e depends on (seed, offset, e) only, so a longer shape begins
    with the elements of a shorter one.

    Raises:
        ValueError: a negative size, a seed or offset outside 64 bits, or `impl` cannot run here.
        TypeError: not a tuple or list of integers, or not a supported dtype.
    """
    _check_dtype(dtype)
    _checks.check_word("seed", seed)
    _checks.check_word("offset", offset)
    shape = _checks.check_integers("shape", shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: sizes must be >= 0, got {_checks.short(tuple(shape))}")
    if math.prod(shape) >= 2**63:
        raise ValueError(f"shape: must have fewer than 2^63 elements, got {_checks.short(tuple(shape))}")
    like = torch.empty(0, dtype=dtype, device=device)
    available, why_not = ops.implementations(like.device, dtypes=(dtype,))
    chosen = _checks.choose_implementation("token_noise_eps", impl, like.device, available, why_not)
    if chosen == "reference":
        return reference.token_noise_eps(shape, seed, offset, like.device, dtype)
    return ops.token_noise_eps(like, shape, seed, offset, chosen)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(f"dtype: must be float32, bfloat16, float16 or float64, got {_checks.short(dtype)}")


def _scale(name: str, value: torch.Tensor | float, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The scale as a tensor of the rank of x."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = _checks.check_number(name, value, finite=False)
        return x.new_full((1,) * x.ndim, value, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: must be a number or a tensor, got {_checks.describe(value)}")
    _checks.check_float(name, value)
    if value.device != x.device:
        raise ValueError(f"{name}: must be on the device of x ({x.device}), got {_checks.describe(value)}")
    fits = value.ndim in (0, 2, x.ndim) and all(n == 1 or n == m for n, m in zip(value.shape, shape, strict=False))
    if not fits:
        raise ValueError(
            f"{name}: must broadcast to (B, F) = {shape[:2]} or, with all its dimensions, to (B, F, ...) = {shape}, "
            f"got {_checks.describe(value)}"
        )
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))
