"""causal_conv3d and past_term: argument checks and choice of implementation."""

from __future__ import annotations

import torch

from .. import _checks
from ..layout import FrameLayout
from . import ops, reference


def causal_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    layout: FrameLayout,
    *,
    past_scale: torch.Tensor | None = None,
    last_scale: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    pad_value: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Causal convolution over (time, Y, X); clean and noisy frames alike see the clean past.

    y[f] = last_scale[f] * (weight[:, :, -1] conv x[f]) + past_scale[f] * P[frame of f], where P[i] sums the
    other kt - 1 taps over clean frames i - kt + 1 .. i - 1. P is computed once and shared by all streams:
    (kt - 1) T + (1 + K) T tap passes instead of kt (1 + K) T. With K = 0 and no scales it equals
    `F.conv3d(torch.cat([history, x], 2), weight, padding=(0, ky // 2, kx // 2))`. In a block of several frames
    a noisy frame's past taps read its own copy inside the block and the clean stream before it (a slower route:
    every stream runs its own past taps). Deterministic.

    Args:
        x: (B, Cin, F, Y, X). channels_last_3d is the fast memory format; any strides work.
        weight: (Cout, Cin, kt, ky, kx), ky and kx odd, of the dtype and device of x. Stride 1, zero "same"
            padding in space. weight[:, :, -1] acts on the current frame.
        layout: the geometry; F must equal `layout.total_frames`. Tokens per frame, window and sink are for attention
            and are ignored here, so that maps of every resolution can share one layout.
        past_scale, last_scale: (B, F), None for 1.
        history: (B, Cin, kt - 1, Y, X), the clean frames before frame 0, oldest first.
        pad_value: without `history`, the constant that fills those frames; the spatial padding around them
            stays 0.
        impl: "auto", "reference" (one frame at a time, any float dtype), "composed" (library convolutions),
            "cpp" (the CPU's C++ kernel, float32) or "triton", neither for noisy frames in blocks of several. A named
            one is used or refused, never replaced. "auto" is cpp on the CPU and triton on CUDA, but composed where
            they cannot run or triton is slower according to the table of `python -m sae_kernels.tune`;
            `python -m sae_kernels` prints both.

    Returns:
        (B, Cout, F, Y, X) of the dtype of x; channels_last_3d if the channels of x are innermost in memory,
        else contiguous. Differentiable in x, weight, both scales and history.

    Raises:
        ValueError: a shape, device or value breaks its rule, or `impl` cannot run here.
        TypeError: not a tensor, or not a supported or matching dtype.
    """
    _check(x, weight, layout, past_scale, last_scale, history, pad_value)
    available, why_not = ops.implementations(x.device, _computed_in(x), layout.frames_per_block, layout.noisy_copies)
    chosen = _checks.choose_implementation("causal_conv3d", impl, x.device, available, why_not)
    if chosen == "reference":
        return reference.causal_conv3d(x, weight, layout, past_scale, last_scale, history, float(pad_value))
    if impl == "auto" and chosen == "triton":
        chosen = "auto"  # the op knows the sizes, and the measurements for them
    keep_past = past_scale is not None and past_scale.requires_grad and torch.is_grad_enabled()
    out, _ = ops.causal_conv3d_fwd(
        x,
        weight,
        past_scale,
        last_scale,
        history,
        float(pad_value),
        layout.frames,
        layout.frames_per_block,
        layout.noisy_copies,
        layout.noisy_first,
        keep_past,
        chosen,
    )
    return out


def past_term(history: torch.Tensor, weight: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """P of one frame: the sum of all taps except the last over the clean frames before it.

    It stays the same over all denoiser evaluations of a frame, so a sampler computes it once: the frame's
    output is last_scale * F.conv2d(x, weight[:, :, -1], padding="same") + past_scale * P.

    Args:
        history: (B, Cin, kt - 1, Y, X), the clean frames before the frame, oldest first.
        weight: (Cout, Cin, kt, ky, kx), the whole kernel, as for `causal_conv3d`.
        impl: as for `causal_conv3d`.

    Returns:
        (B, Cout, Y, X) in channels_last memory, zero if kt = 1; differentiable in both arguments.

    Raises:
        ValueError, TypeError: as for `causal_conv3d`.
    """
    _checks.check_tensor("history", history, shape="(B, Cin, kt - 1, Y, X)")
    _checks.check_float("history", history)
    _check_weight(weight, "history", history)
    _checks.check_size("history", "frames", history.shape[2], "kt - 1 of weight", weight.shape[2] - 1)
    available, why_not = ops.implementations(history.device, _computed_in(history))
    chosen = _checks.choose_implementation("past_term", impl, history.device, available, why_not)
    if chosen == "reference":
        return reference.past_term(history, weight)
    if impl == "auto" and chosen == "triton":
        chosen = "auto"
    return ops.causal_conv3d_past_fwd(history, weight, chosen)


def _computed_in(x: torch.Tensor) -> torch.dtype:
    """The dtype that the op sees, behind its autocast rule."""
    device = x.device.type
    if device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _check(x, weight, layout, past_scale, last_scale, history, pad_value) -> None:
    if not isinstance(layout, FrameLayout):
        raise TypeError(f"layout: must be a FrameLayout, got {_checks.describe(layout)}")
    _checks.check_tensor("x", x, shape="(B, Cin, F, Y, X)")
    _checks.check_float("x", x)
    _checks.check_size("x", "frames", x.shape[2], "layout.total_frames", layout.total_frames)
    _check_weight(weight, "x", x)
    B, Cin, F, Y, X = x.shape
    for name, scale in (("past_scale", past_scale), ("last_scale", last_scale)):
        if scale is not None:
            _checks.check_tensor(name, scale, shape="(B, F)")
            _check_like(name, scale, "x", x)
            if tuple(scale.shape) != (B, F):
                raise ValueError(f"{name}: must have shape (B, F) = {(B, F)}, got {_checks.describe(scale)}")
    if history is not None:
        _checks.check_tensor("history", history, shape="(B, Cin, kt - 1, Y, X)")
        _check_like("history", history, "x", x)
        wanted = (B, Cin, weight.shape[2] - 1, Y, X)
        if tuple(history.shape) != wanted:
            raise ValueError(
                f"history: must have shape (B, Cin, kt - 1, Y, X) = {wanted}, got {_checks.describe(history)}"
            )
    _checks.check_number("pad_value", pad_value, finite=False)


def _check_weight(weight, name: str, x: torch.Tensor) -> None:
    _checks.check_tensor("weight", weight, shape="(Cout, Cin, kt, ky, kx)")
    _check_like("weight", weight, name, x)
    _checks.check_size("weight", "input channels", weight.shape[1], f"channels of {name}", x.shape[1])
    if 0 in weight.shape:
        raise ValueError(f"weight: every size must be >= 1, got {_checks.describe(weight)}")
    if weight.shape[3] % 2 == 0 or weight.shape[4] % 2 == 0:
        raise ValueError(f"weight: ky and kx must be odd, got {weight.shape[3]} and {weight.shape[4]}")
    if x.shape[3] < 1 or x.shape[4] < 1:
        raise ValueError(f"{name}: Y and X must be >= 1, got {_checks.describe(x)}")


def _check_like(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    autocast = other.device.type != "meta" and torch.is_autocast_enabled(other.device.type)
    if autocast and torch.float64 not in (value.dtype, other.dtype):
        _checks.check_float(name, value)
        other = other.to(value.dtype)  # the op's autocast rule makes them equal; the device is still checked
    _checks.check_like(name, value, other_name, other)
