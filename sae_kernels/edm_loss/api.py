"""edm_loss: argument checks and choice of implementation."""

from __future__ import annotations

import torch

from .. import _checks
from ..layout import FrameLayout
from . import ops, reference


def edm_loss(
    raw: torch.Tensor,
    x0: torch.Tensor,
    sigma: torch.Tensor,
    layout: FrameLayout,
    *,
    seed: int,
    offset: int = 0,
    sigma_data: float = 1.0,
    impl: str = "auto",
) -> torch.Tensor:
    """EDM's weighted denoising loss of each noisy frame, from the network's raw output (Karras et al. 2022, table 1).

    With eps the noisy frames' part of `token_noise_eps((B, F, ...), seed=seed, offset=offset)`, d = sigma_data and
    `D = d^2 / (s^2 + d^2) * (x0 + s * eps) + s * d / sqrt(s^2 + d^2) * raw`, it is
    `(s^2 + d^2) / (s d)^2 * ((D - x0)**2).mean(over everything inside a frame)`. eps is made again, forward and
    backward: neither noised input, nor target, nor denoised image is stored. Computed in fp32 (fp64 for fp64 raw).
    Deterministic.

    Args:
        raw: (B, K T, ...) the network's output before preconditioning, noisy frames only; any strides and float dtype.
        x0: (B, T, ...) clean data.
        sigma: (B, K T) noise levels, > 0. Not checked, as that would wait for the device: every implementation gives
            what the formula gives, NaN for a frame of level 0, infinity or NaN, a number for a negative one. Levels
            whose square overflows or vanishes in the reference are right in the others.
        layout: its frames, noisy_copies and noisy_first are used; noisy_copies >= 1.
        seed, offset: those given to `token_noise` for the network's input.
        sigma_data: d, > 0.
        impl: "auto", "reference", "composed", "cpp" (the C++ extension on the CPU) or "cuda" (on CUDA). A named one is
            used or refused, never replaced.

    Returns:
        (B, K T), float32 (float64 for float64 raw); NaN, the mean of nothing, for frames without elements. Gradient
        flows to raw alone.

    Raises:
        ValueError: a shape, device or value breaks its rule, or `impl` cannot run here.
        TypeError: not a tensor, not an integer, or not a supported dtype.
    """
    if not isinstance(layout, FrameLayout):
        raise TypeError(f"layout: must be a FrameLayout, got {_checks.describe(layout)}")
    if layout.noisy_copies < 1:
        raise ValueError(f"layout: noisy_copies must be at least 1, got {layout.noisy_copies}")
    for name, value in (("raw", raw), ("x0", x0), ("sigma", sigma)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: must be a tensor, got {_checks.describe(value)}")
        _checks.check_float(name, value)
        if value.device != raw.device:
            raise ValueError(f"{name}: must be on the device of raw ({raw.device}), got {_checks.describe(value)}")
    if raw.ndim < 3:
        raise ValueError(f"raw: must have shape (B, K T, ...), got {_checks.describe(raw)}")
    _checks.check_size("raw", "frames", raw.shape[1], "K T", layout.noisy_copies * layout.frames)
    if x0.shape != (raw.shape[0], layout.frames, *raw.shape[2:]):
        raise ValueError(f"x0: must have shape (B, T, ...) of raw {tuple(raw.shape)}, got {_checks.describe(x0)}")
    if sigma.shape != raw.shape[:2]:
        raise ValueError(f"sigma: must have shape (B, K T) = {tuple(raw.shape[:2])}, got {_checks.describe(sigma)}")
    sigma_data = _checks.check_number("sigma_data", sigma_data)
    if sigma_data <= 0:
        raise ValueError(f"sigma_data: must be a number > 0, got {sigma_data}")
    _checks.check_word("seed", seed)
    _checks.check_word("offset", offset)

    available, why_not = ops.implementations(raw.device, raw.ndim)
    chosen = _checks.choose_implementation("edm_loss", impl, raw.device, available, why_not)
    if chosen == "reference":
        eps = ops.noise(raw, x0, layout.streams, layout.noisy_first, seed, offset)
        return reference.edm_loss(raw, x0.detach(), sigma.detach(), eps, sigma_data)
    return ops.edm_loss_fwd(raw, x0, sigma, layout.streams, layout.noisy_first, sigma_data, seed, offset, chosen)
