"""edm_loss: argument checks and choice of implementation."""

from __future__ import annotations

import torch

from .. import _checks
from .._deprecated import renamed_arguments
from ..layout import FrameLayout
from . import ops, reference


@renamed_arguments(raw="model_output")
def edm_loss(
    model_output: torch.Tensor,
    x0: torch.Tensor,
    sigma: torch.Tensor,
    layout: FrameLayout,
    *,
    seed: int,
    offset: int = 0,
    sigma_data: float = 1.0,
    impl: str = "auto",
) -> torch.Tensor:
    """EDM's weighted denoising loss of each noisy frame, from the network's output (Karras et al. 2022, table 1).

    With eps the noisy frames' part of `token_noise_eps((B, F, ...), seed=seed, offset=offset)`, d = sigma_data and
    `D = d^2 / (s^2 + d^2) * (x0 + s * eps) + s * d / sqrt(s^2 + d^2) * model_output`, it is
    `(s^2 + d^2) / (s d)^2 * ((D - x0)**2).mean(over everything inside a frame)`. eps is generated again, forward and
    backward: neither the noised input, nor the target, nor the denoised image is stored. Computed in fp32, or in fp64
    where model_output is fp64. Deterministic.

    Args:
        model_output: (B, K T, ...) the network's output before preconditioning, noisy frames only; any strides, any
            float dtype.
        x0: (B, T, ...) clean data.
        sigma: (B, K T) noise levels, > 0. Not checked, as that would synchronise the device: every implementation
            returns what the formula gives, NaN for a frame of level 0, infinity or NaN, a number for a negative one.
            Levels whose square overflows or vanishes in the reference are handled correctly by the others.
        layout: its frames, noisy_copies and noisy_first are used; noisy_copies >= 1.
        seed, offset: those given to `token_noise` for the network's input.
        sigma_data: d, > 0.
        impl: "auto", "reference", "composed", "cpp" (the C++ extension on the CPU) or "cuda" (on CUDA). A named one is
            used or refused, never replaced.

    Returns:
        (B, K T), float32, or float64 where model_output is float64; NaN, the mean of nothing, for frames without
        elements. The gradient flows to model_output alone.

    Raises:
        ValueError: a shape, device or value breaks its rule, or `impl` cannot run here.
        TypeError: not a tensor, not an integer, or not a supported dtype.
    """
    if not isinstance(layout, FrameLayout):
        raise TypeError(f"layout: must be a FrameLayout, got {_checks.describe(layout)}")
    if layout.noisy_copies < 1:
        raise ValueError(f"layout: noisy_copies must be at least 1, got {layout.noisy_copies}")
    for name, value in (("model_output", model_output), ("x0", x0), ("sigma", sigma)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: must be a tensor, got {_checks.describe(value)}")
        _checks.check_float(name, value)
        if value.device != model_output.device:
            raise ValueError(
                f"{name}: must be on the device of model_output ({model_output.device}), got {_checks.describe(value)}"
            )
    if model_output.ndim < 3:
        raise ValueError(f"model_output: must have shape (B, K T, ...), got {_checks.describe(model_output)}")
    _checks.check_size("model_output", "frames", model_output.shape[1], "K T", layout.noisy_copies * layout.frames)
    if x0.shape != (model_output.shape[0], layout.frames, *model_output.shape[2:]):
        raise ValueError(
            f"x0: must have shape (B, T, ...) of model_output {tuple(model_output.shape)}, got {_checks.describe(x0)}"
        )
    if sigma.shape != model_output.shape[:2]:
        raise ValueError(
            f"sigma: must have shape (B, K T) = {tuple(model_output.shape[:2])}, got {_checks.describe(sigma)}"
        )
    sigma_data = _checks.check_number("sigma_data", sigma_data)
    if sigma_data <= 0:
        raise ValueError(f"sigma_data: must be a number > 0, got {sigma_data}")
    _checks.check_word("seed", seed)
    _checks.check_word("offset", offset)

    available, why_not = ops.implementations(model_output.device, model_output.ndim)
    chosen = _checks.choose_implementation("edm_loss", impl, model_output.device, available, why_not)
    if chosen == "reference":
        eps = ops.noise(model_output, x0, layout.streams, layout.noisy_first, seed, offset)
        return reference.edm_loss(model_output, x0.detach(), sigma.detach(), eps, sigma_data)
    layout_options = (layout.streams, layout.noisy_first)
    return ops.edm_loss_fwd(model_output, x0, sigma, *layout_options, sigma_data, seed, offset, chosen)
