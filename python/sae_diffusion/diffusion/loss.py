"""The denoising loss per frame, and the running fit that brings every noise level to the same scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sae_kernels import FrameLayout, edm_loss, token_noise
from sae_kernels._deprecated import renamed_arguments

MAX_LOG10_FIT = 4.0


def loss_weight(sigma: torch.Tensor, sigma_data: float | torch.Tensor = 1.0) -> torch.Tensor:
    """lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2: the loss of an untrained network is 1 at every level.

    Source: Karras et al. 2022 (EDM), table 1.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


@renamed_arguments(raw="model_output")
def denoising_loss(
    denoiser: Callable[..., torch.Tensor],
    x0: torch.Tensor,
    actions: torch.Tensor | None,
    sigmas: torch.Tensor,
    *,
    noisy_copies: int,
    seed: int,
    offset: int = 0,
    spatial_only: bool = False,
    sigma_data: float = 1.0,
    prior: Any = None,
    context: torch.Tensor | None = None,
    model_output: bool | None = None,
) -> torch.Tensor:
    """Weighted squared error of the denoised noisy copies, per frame.

    From the network's own output the loss is computed by `sae_kernels.edm_loss`, which makes the noise again: neither
    the target, nor the denoised frames, nor their error are stored.

    Args:
        denoiser: called as denoiser(x, sigma, actions, noisy_copies=K), or with spatial_only=True on noisy frames.
        x0: (B, T, C, Y, X) normalised clips.
        actions: (B, T) int64, (B, T, A) float or None: the action that caused each frame.
        sigmas: (B, (1 + K) T), clean stream first, as `sample_sigmas` gives them.
        noisy_copies: K, at least 1.
        seed, offset: of the counter-based noise (`sae_kernels.token_noise`): the same values give the same noise.
        spatial_only: train every frame by itself, without a past.
        sigma_data: of the denoiser's preconditioning.
        prior: the denoiser's `FramePrior`, where its preconditioning is built on one: errors are weighted by
            loss_weight(sigma, the prior's std) then. It is not used with spatial_only.
        context: (B, T, C, Y, X) shown to the network in place of x0 in the clean copy, with the same noise.
        model_output: whether the denoiser takes model_output=True and then returns what c_out multiplies, as `Denoiser`
            does. None reads its attribute `gives_model_output`, which a wrapper such as DistributedDataParallel hides.

    Returns:
        (B, K T) in fp32 (fp64 where the denoiser's output is): loss_weight(sigma) * mean over C, Y, X of (D - x0)^2.

    Raises:
        ValueError: noisy_copies below 1, or shapes that do not fit together.
    """
    if noisy_copies < 1:
        raise ValueError(f"noisy_copies: must be at least 1, got {noisy_copies}")
    if x0.ndim != 5:
        raise ValueError(f"x0: must have shape (B, T, C, Y, X), got {tuple(x0.shape)}")
    batch, frames = x0.shape[0], x0.shape[1]
    wanted = (batch, (1 + noisy_copies) * frames)
    if sigmas.shape != wanted:
        raise ValueError(f"sigmas: must have shape (B, (1 + K) T) = {wanted}, got {tuple(sigmas.shape)}")
    layout = FrameLayout(frames=frames, tokens_per_frame=x0.shape[-2] * x0.shape[-1], noisy_copies=noisy_copies)
    x: Any = token_noise(x0.contiguous(), torch.ones_like(sigmas), sigmas, layout, seed=seed, offset=offset)
    noisy_sigmas = sigmas[:, frames:]
    if context is not None:
        x[:, :frames] += context - x0
    if model_output is None:
        model_output = getattr(denoiser, "gives_model_output", False)
    options: dict[str, Any] = {"model_output": True} if model_output else {}
    if spatial_only:
        repeated = None if actions is None else torch.cat([actions] * noisy_copies, dim=1)
        denoised = denoiser(x[:, frames:], noisy_sigmas, repeated, spatial_only=True, **options)
    else:
        denoised = denoiser(x, sigmas, actions, noisy_copies=noisy_copies, **options)[:, frames:]
    expected = None if prior is None or spatial_only else prior(x[:, :frames], sigmas[:, :frames])
    return frame_errors(
        denoised, x0, noisy_sigmas, layout, model_output=model_output, seed=seed, offset=offset, sigma_data=sigma_data,
        expected=expected,
    )  # fmt: skip


def frame_errors(
    output: torch.Tensor,
    x0: torch.Tensor,
    sigma: torch.Tensor,
    layout: FrameLayout,
    *,
    model_output: bool,
    seed: int,
    offset: int,
    sigma_data: float,
    expected: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """The loss of each noisy frame, (B, K T), of a denoiser's output for noisy copies (B, K T, C, Y, X).

    Around a prior N(m, s^2) preconditioning, weight and so the loss are those of EDM for (x - m) / s at the level
    sigma / s, with sigma_data = 1.

    Args:
        model_output: whether the output is what c_out multiplies, or D.
        expected: the prior's mean (B, T, C, Y, X) and std (B, T); None = N(0, sigma_data^2).
    """
    if model_output and expected is not None:
        mean, std = expected
        x0, sigma_data = (x0 - mean) / std[..., None, None, None], 1.0
        sigma = sigma / std.repeat(1, layout.noisy_copies)
    if model_output:
        return edm_loss(output, x0, sigma, layout, seed=seed, offset=offset, sigma_data=sigma_data)
    spread = sigma_data if expected is None else expected[1].repeat(1, layout.noisy_copies)
    if output.dtype != torch.float64:
        output = output.float()
    error = output.unflatten(1, (-1, x0.shape[1])) - x0.unsqueeze(1)
    return loss_weight(sigma, spread) * error.square().mean(dim=(-3, -2, -1)).flatten(1)


def _basis(sigma: torch.Tensor) -> torch.Tensor:
    """{1/2, cos n u, sin n u, n = 1..3} of u = log10 sigma, |u| <= pi; (..., 7) fp64."""
    angle = sigma.double().log10().clamp(-math.pi, math.pi).unsqueeze(-1)
    n = torch.arange(1, 4, dtype=torch.float64, device=sigma.device)
    return torch.cat([torch.full_like(angle, 0.5), (n * angle).cos(), (n * angle).sin()], dim=-1)


class LossNormalizer:
    """Divides each frame's loss by the loss expected at its noise level, so that no level dominates the gradient.

    The last `size` pairs (sigma, weighted loss) are kept, and log10 loss is fitted on a Fourier basis of log10 sigma by
    least squares every `fit_every` records. Until the first fit the divisor is 1. With several ranks, give `record` the
    gathered pairs of all ranks in the same order on each: then every rank computes the same fit, bit for bit.

    Args:
        size: pairs kept.
        fit_every: records (training steps) between fits.
        ridge: added to the diagonal of the normal equations, per pair; coefficients that no pair determines stay 0.
        device: of the kept pairs; the fit itself runs on the CPU in fp64.
    """

    def __init__(
        self, size: int = 10_000, fit_every: int = 50, *, ridge: float = 1e-4, device: torch.device | str = "cpu"
    ) -> None:
        if size < 1 or fit_every < 1:
            raise ValueError(f"size, fit_every: must be at least 1, got {size}, {fit_every}")
        self.size, self.fit_every, self.ridge = size, fit_every, ridge
        self.sigmas = torch.ones(size, device=device)
        self.losses = torch.ones(size, device=device)
        self._set_coefficients(torch.zeros(7, dtype=torch.float64))
        self.pairs_seen = 0
        self.records = 0

    def expected_loss(self, sigma: torch.Tensor) -> torch.Tensor:
        """10^fit(sigma), fp32, without gradient."""
        with torch.no_grad():
            fit = _basis(sigma) @ self._on_device.to(sigma.device)
            return (10.0 ** fit.clamp(-MAX_LOG10_FIT, MAX_LOG10_FIT)).float()

    def __call__(self, sigma: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return loss / self.expected_loss(sigma)

    @torch.no_grad()
    def record(self, sigma: torch.Tensor, loss: torch.Tensor) -> None:
        """Append pairs (any shape, flattened); every `fit_every` calls, fit again."""
        sigma, loss = sigma.detach().flatten().float(), loss.detach().flatten().float()
        if sigma.shape != loss.shape:
            raise ValueError(f"loss: must have as many elements as sigma = {sigma.numel()}, got {loss.numel()}")
        count = sigma.numel()
        kept = min(count, self.size)
        end = self.pairs_seen + count
        slots = torch.arange(end - kept, end, device=self.sigmas.device) % self.size
        self.sigmas[slots] = sigma[count - kept :].to(self.sigmas.device)
        self.losses[slots] = loss[count - kept :].to(self.losses.device)
        self.pairs_seen += count
        self.records += 1
        if self.records % self.fit_every == 0:
            self.fit()

    @torch.no_grad()
    def fit(self) -> None:
        """Ridge least squares of log10 loss; pairs that are not finite are left out."""
        held = min(self.pairs_seen, self.size)
        sigma, loss = self.sigmas[:held].cpu(), self.losses[:held].cpu()
        finite = torch.isfinite(loss) & torch.isfinite(sigma)
        if not finite.any():
            return
        basis = _basis(sigma[finite])
        target = loss[finite].double().clamp(min=10.0**-8).log10()
        gram = basis.T @ basis / len(target) + self.ridge * torch.eye(7, dtype=torch.float64)
        self._set_coefficients(torch.linalg.solve(gram, basis.T @ target / len(target)))

    def _set_coefficients(self, coefficients: torch.Tensor) -> None:
        self.coefficients = coefficients
        # copied once for each fit, because a copy for each loss would synchronise the accelerator
        self._on_device = coefficients.to(self.losses.device)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Plain tensors; restoring them continues bit for bit."""
        return {
            "sigmas": self.sigmas.cpu().clone(),
            "losses": self.losses.cpu().clone(),
            "coefficients": self.coefficients.clone(),
            "counters": torch.tensor([self.pairs_seen, self.records]),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state["sigmas"].shape != (self.size,):
            raise ValueError(f"sigmas: must have shape ({self.size},), got {tuple(state['sigmas'].shape)}")
        self.sigmas.copy_(state["sigmas"])
        self.losses.copy_(state["losses"])
        self._set_coefficients(state["coefficients"].to(torch.float64).clone())
        self.pairs_seen, self.records = (int(n) for n in state["counters"])
