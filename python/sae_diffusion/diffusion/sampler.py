"""Sampling block by block with a cache: the EDM schedule and solvers (Karras et al. 2022, algorithms 1 and 2).

B batch, n given frames, N generated frames, f frames per block, C channels, Y, X pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sae_kernels import token_noise_eps

from .config import SamplerConfig

# The normals of a frame are numbered by (frame, sample, draw): draw 0 starts the ODE, draw i + 1 churns step i.
_SAMPLE_BITS, _DRAW_BITS = 16, 16
_CONTEXT_DRAW = 2**_DRAW_BITS - 1


def sigma_schedule(config: SamplerConfig) -> torch.Tensor:
    """Noise levels, fp64 (sampling_steps + 1), the last one 0 (EDM eq. 5).

    sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < N = sampling_steps.
    """
    ramp = torch.linspace(0, 1, config.sampling_steps, dtype=torch.float64)
    first, last = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
    return torch.cat([(first + ramp * (last - first)) ** config.rho, ramp.new_zeros(1)])


def generate(
    denoiser: Any,
    context: torch.Tensor | None,
    actions: torch.Tensor | None,
    num_frames: int,
    config: SamplerConfig | None = None,
    *,
    seed: int = 0,
    guide: Any = None,
    cache: Any = None,
    guide_cache: Any = None,
    batch: int | None = None,
    callback: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Draw `num_frames` frames (B, N, C, Y, X) that continue `context`; arguments as in `iter_frames`.

    `callback` is called with the number of frames finished so far after each block.
    """
    blocks = []
    for block in iter_frames(
        denoiser,
        context,
        actions,
        num_frames,
        config,
        seed=seed,
        guide=guide,
        cache=cache,
        guide_cache=guide_cache,
        batch=batch,
    ):
        blocks.append(block)
        if callback is not None:
            callback(sum(b.shape[1] for b in blocks))
    return torch.cat(blocks, dim=1)


def iter_frames(
    denoiser: Any,
    context: torch.Tensor | None,
    actions: torch.Tensor | None,
    num_frames: int,
    config: SamplerConfig | None = None,
    *,
    seed: int = 0,
    guide: Any = None,
    cache: Any = None,
    guide_cache: Any = None,
    batch: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield finished blocks (B, f, C, Y, X) one at a time; memory is bounded when the network has a window.

    The noise of a frame depends on (seed, absolute frame index, sample index) only, so a call that continues a cache
    goes on bit for bit as one longer call would.

    Args:
        denoiser: a `Denoiser` in eval mode.
        context: given frames (B, n, C, Y, X), normalised, n a multiple of f; None to start from nothing or `cache`.
        actions: (B, n + N) int64 or (B, n + N, A) float, the action that caused each frame; None for no conditioning.
        num_frames: N, a multiple of f.
        guide: the weaker network of autoguidance.
        cache, guide_cache: from `new_cache(B)`, empty or left by an earlier call; filled in place. None = fresh ones.
        batch: B when neither context, actions nor cache tell it; 1 by default.

    Raises:
        ValueError: shapes that do not agree, or a guide that is missing or not used.
    """
    config = config or SamplerConfig()
    networks, batch = check_request(
        denoiser, context, actions, num_frames, config, guide=guide, cache=cache, guide_cache=guide_cache, batch=batch
    )
    return BlockSampler(networks, config, seed, batch).run(context, actions, num_frames)


def check_request(
    denoiser: Any,
    context: torch.Tensor | None,
    actions: torch.Tensor | None,
    num_frames: int,
    config: SamplerConfig,
    *,
    guide: Any,
    cache: Any,
    guide_cache: Any,
    batch: int | None,
) -> tuple[list[tuple[Any, Any]], int]:
    """Networks with their caches, the guide last, and the batch of a call of `iter_frames`; raises its errors."""
    block_frames = denoiser.config.frames_per_block
    given = 0 if context is None else context.shape[1]
    sizes = {
        "context": None if context is None else context.shape[0],
        "actions": None if actions is None else actions.shape[0],
        "cache": None if cache is None else cache.batch,
        "guide_cache": None if guide_cache is None else guide_cache.batch,
    }
    for name, size in sizes.items():
        if size is not None and batch is not None and size != batch:
            raise ValueError(f"{name}: batch must be {batch}, got {size}")
        batch = batch if size is None else size
    batch = 1 if batch is None else batch
    frame_shape = (denoiser.config.channels, denoiser.config.height, denoiser.config.width)
    if context is not None and (context.ndim != 5 or tuple(context.shape[2:]) != frame_shape):
        raise ValueError(
            f"context: must have shape (B, n, C, Y, X) with (C, Y, X) = {frame_shape}, got {tuple(context.shape)}"
        )
    for name, frames in (("context", given), ("num_frames", num_frames)):
        if frames % block_frames or frames < 0:
            raise ValueError(f"{name}: frames must be a multiple of frames_per_block = {block_frames}, got {frames}")
    if actions is not None and actions.shape[1] != given + num_frames:
        raise ValueError(
            f"actions: need one for each of the {given} context and {num_frames} new frames = {given + num_frames}, "
            f"got {actions.shape[1]}"
        )
    if batch > 2**_SAMPLE_BITS:
        raise ValueError(f"batch: must be at most {2**_SAMPLE_BITS}, got {batch}")
    if guide is not None and config.guidance_kind != "auto":
        raise ValueError(f"guide: is used with guidance_kind 'auto' only, got guidance_kind {config.guidance_kind!r}")
    if guide is None and config.guidance_kind == "auto" and config.guidance != 1:
        raise ValueError("guide: guidance_kind 'auto' needs a second network, got None")

    networks = [(denoiser, denoiser.new_cache(batch) if cache is None else cache)]
    if guide is not None:
        networks.append((guide, guide.new_cache(batch) if guide_cache is None else guide_cache))
        if networks[0][1].frames != networks[1][1].frames:
            raise ValueError(
                f"guide_cache: must hold as many frames as cache = {networks[0][1].frames}, got {networks[1][1].frames}"
            )
    return networks, batch


class BlockSampler:
    """One run: networks with their caches (the guide last), noise levels, and where the noise comes from."""

    def __init__(self, networks: list[tuple[Any, Any]], config: SamplerConfig, seed: int, batch: int) -> None:
        network = networks[0][0]
        weight = next(network.parameters())
        self.networks, self.config, self.seed = networks, config, seed
        self.batch, self.block_frames, self.device = batch, network.config.frames_per_block, weight.device
        self.frame_shape = (network.config.channels, network.config.height, network.config.width)
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.sigmas = sigma_schedule(config).tolist()

    def run(
        self, context: torch.Tensor | None, actions: torch.Tensor | None, num_frames: int
    ) -> Iterator[torch.Tensor]:
        done = self.start(context, actions)
        for start in range(done, done + num_frames, self.block_frames):
            caused_by = None if actions is None else actions[:, start : start + self.block_frames]
            x = self.draw(self.block_frames, caused_by)
            self.append(x, caused_by)
            yield x

    def start(self, context: torch.Tensor | None, actions: torch.Tensor | None) -> int:
        """Enter the context; returns its number of frames."""
        if context is None or not context.shape[1]:
            return 0
        given = context.shape[1]
        self.append(context.to(self.device, self.dtype), None if actions is None else actions[:, :given])
        return given

    @torch.no_grad()
    def append(self, x: torch.Tensor, actions: torch.Tensor | None) -> None:
        """Enter finished frames into every cache at the context's noise level."""
        config = self.config
        if config.context_noise:
            x = x + config.context_noise * self.noise(x.shape[1], _CONTEXT_DRAW)
        for network, cache in self.networks:
            network.prefill(x, self.levels(config.context_sigma, x.shape[1]), self.on_device(actions), cache)

    @torch.no_grad()
    def draw(self, frames: int, actions: torch.Tensor | None) -> torch.Tensor:
        """One block by EDM algorithm 2 (algorithm 1 when churn is 0)."""
        config, actions = self.config, self.on_device(actions)
        x = self.sigmas[0] * self.noise(frames, 0)
        for i, (sigma, next_sigma) in enumerate(zip(self.sigmas, self.sigmas[1:])):
            x, sigma = self.churned(x, sigma, i)
            slope = (x - self.denoise(x, sigma, actions)) / sigma
            euler = x + (next_sigma - sigma) * slope
            if next_sigma > 0 and config.solver == "heun":
                next_slope = (euler - self.denoise(euler, next_sigma, actions)) / next_sigma
                x = x + (next_sigma - sigma) * 0.5 * (slope + next_slope)
            else:
                x = euler
        return x

    def churned(self, x: torch.Tensor, sigma: float, step: int, ahead: int = 0) -> tuple[torch.Tensor, float]:
        """x and its noise level after the noise that is added before a step."""
        config = self.config
        if not (config.churn > 0 and config.churn_min <= sigma <= config.churn_max):
            return x, sigma
        raised = sigma * (1 + min(config.churn / config.sampling_steps, math.sqrt(2) - 1))
        spread = config.churn_noise * math.sqrt(raised**2 - sigma**2)
        return x + spread * self.noise(x.shape[1], step + 1, ahead), raised

    def denoise(self, x: torch.Tensor, sigma: float, actions: torch.Tensor | None) -> torch.Tensor:
        return self.estimate(x, self.levels(sigma, x.shape[1]), actions)

    def estimate(self, x: torch.Tensor, levels: torch.Tensor, actions: torch.Tensor | None) -> torch.Tensor:
        """D of one block or of several in flight, or D_weak + w (D - D_weak) under guidance."""

        def seeing_the_past(network: Any, cache: Any) -> torch.Tensor:
            call = network.denoise if x.shape[1] <= self.block_frames else network.denoise_sequence
            return call(x, levels, actions, cache)

        strong = seeing_the_past(*self.networks[0])
        if self.config.guidance == 1:
            return strong
        if self.config.guidance_kind == "auto":
            weak = seeing_the_past(*self.networks[1])
        else:
            weak = self.networks[0][0](x, levels, actions, spatial_only=True)
        return weak + self.config.guidance * (strong - weak)

    def noise(self, frames: int, draw: int, ahead: int = 0) -> torch.Tensor:
        """Normals (B, frames, C, Y, X) for the frames that come next in the cache, after `ahead` others."""
        first = self.networks[0][1].frames + ahead
        rows = []
        for sample in range(self.batch):
            for frame in range(first, first + frames):
                offset = (frame << (_SAMPLE_BITS + _DRAW_BITS)) | (sample << _DRAW_BITS) | draw
                rows.append(
                    token_noise_eps(
                        self.frame_shape,
                        seed=self.seed,
                        offset=offset,
                        device=self.device,
                        dtype=torch.float32,
                    )
                )
        return torch.stack(rows).view(self.batch, frames, *self.frame_shape).to(self.dtype)

    def levels(self, sigma: float, frames: int) -> torch.Tensor:
        return torch.full((self.batch, frames), sigma, dtype=self.dtype, device=self.device)

    def on_device(self, actions: torch.Tensor | None) -> torch.Tensor | None:
        return None if actions is None else actions.to(self.device)
