"""Sampling of video with a cache, one block after another or with several in flight, each at its own noise level.

Block k of f frames starts from noise after k N / W steps (rounded down) and takes the N noise levels of
`sigma_schedule` (Karras et al. 2022), one at every step, so that W blocks are in flight at a time and the first of them
is done first. Where W divides N this is `schedules.Triangular(blocks, N, N // W)` in the "ve" scaling. W = 1 is block
by block. With W > 1 the network sees finished frames through its cache, and the blocks in flight with their own noise
levels: it must have been trained with independent ones (`sae train --objective forcing`).

W blocks in flight need about N / W passes for each new block instead of N, each over W blocks. This is exact for
W = 1 only: a block in flight does not look at those after it, which is what makes room for new ones.

B batch, n given frames, N new frames (above: noise levels), f frames per block, C channels, Y, X pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sae_kernels import token_noise_eps
from sae_kernels._deprecated import renamed_arguments, renamed_fields, warn_renamed

from ..renamed import current_value
from .config import SamplerConfig
from .steps import CORRECTED, STEPS, At, Churn, Level, Sigma, trapezoid

# The normals of a frame are numbered by (frame, sample, draw): draw 0 is its start, draw i + 1 that of its step i.
_SAMPLE_BITS, _DRAW_BITS = 16, 16
_CONTEXT_DRAW = 2**_DRAW_BITS - 1


def sigma_schedule(config: SamplerConfig) -> torch.Tensor:
    """Noise levels, fp64 (sampling_steps + 1), the last one 0 (EDM eq. 5).

    sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < N = sampling_steps.
    """
    ramp = torch.linspace(0, 1, config.sampling_steps, dtype=torch.float64)
    first, last = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
    return torch.cat([(first + ramp * (last - first)) ** config.rho, ramp.new_zeros(1)])


@renamed_fields(window_frames="in_flight")
@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What to generate, from what, and how.

    Args:
        num_frames: N, a multiple of f.
        context: given frames (B, n, C, Y, X), normalised, n a multiple of f; None to start from nothing or `cache`.
        actions: (B, n + N) int64 or (B, n + N, A) float, the action that caused each frame; None for no conditioning.
        config: the sampler.
        in_flight: W f, frames that are generated together, each block at its own level: a multiple of f, W at most
            config.sampling_steps; None is f, block by block. More than f are for networks trained with independent
            levels, see `check_independent_levels`.
        seed: of the noise.
        batch: B, if neither context, actions nor cache determine it; 1 by default.
        guide: the weaker network of autoguidance.
        cache, guide_cache: from `new_cache(B)`, empty or from an earlier call; filled in place. None = new ones.
    """

    num_frames: int
    context: torch.Tensor | None = None
    actions: torch.Tensor | None = None
    config: SamplerConfig = field(default_factory=SamplerConfig)
    in_flight: int | None = None
    seed: int = 0
    batch: int | None = None
    guide: Any = None
    cache: Any = None
    guide_cache: Any = None

    def check(self, denoiser: Any) -> int:
        """The batch.

        Raises:
            ValueError: shapes that do not agree, `in_flight` breaks its rule, or a guide is missing or not used.
        """
        f, config = denoiser.config.frames_per_block, self.config
        given = 0 if self.context is None else self.context.shape[1]
        batch = self.batch
        for name in ("context", "actions", "cache", "guide_cache"):
            value = getattr(self, name)
            size = None if value is None else value.shape[0] if isinstance(value, torch.Tensor) else value.batch
            if size is not None and batch is not None and size != batch:
                raise ValueError(f"{name}: batch must be {batch}, got {size}")
            batch = batch if size is None else size
        batch = 1 if batch is None else batch
        frame_shape = _frame_shape(denoiser)
        if self.context is not None and (self.context.ndim != 5 or tuple(self.context.shape[2:]) != frame_shape):
            raise ValueError(
                f"context: must have shape (B, n, C, Y, X) with (C, Y, X) = {frame_shape}, "
                f"got {tuple(self.context.shape)}"
            )
        for name, frames in (("context", given), ("num_frames", self.num_frames)):
            if frames % f or frames < 0:
                raise ValueError(f"{name}: frames must be a multiple of frames_per_block = {f}, got {frames}")
        if self.actions is not None and self.actions.shape[1] != given + self.num_frames:
            raise ValueError(
                f"actions: must have one for each of the {given} context and {self.num_frames} new frames = "
                f"{given + self.num_frames}, got {self.actions.shape[1]}"
            )
        if batch > 2**_SAMPLE_BITS:
            raise ValueError(f"batch: must be at most {2**_SAMPLE_BITS}, got {batch}")
        if self.guide is not None and config.guidance_kind != "auto":
            raise ValueError(
                f"guide: must be None unless guidance_kind is 'auto', got a guide and {config.guidance_kind!r}"
            )
        if self.guide is None and config.guidance_kind == "auto" and config.guidance != 1:
            raise ValueError("guide: must be a second network for guidance_kind 'auto', got None")
        in_flight = f if self.in_flight is None else self.in_flight
        if in_flight < 1 or in_flight % f:
            raise ValueError(f"in_flight: must be a positive multiple of frames_per_block = {f}, got {in_flight}")
        if in_flight // f > config.sampling_steps:
            raise ValueError(
                f"in_flight: must be at most sampling_steps = {config.sampling_steps} blocks, one for each noise "
                f"level, got {in_flight // f}"
            )
        return batch


@renamed_arguments(window_frames="in_flight")
def generate(
    denoiser: Any,
    context: torch.Tensor | None,
    actions: torch.Tensor | None,
    num_frames: int,
    config: SamplerConfig | None = None,
    *,
    callback: Callable[[int], None] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Draw `num_frames` frames (B, N, C, Y, X) that continue `context`.

    Args:
        denoiser, options: as for `iter_frames`.
        context, actions, num_frames, config: see `Request`.
        callback: called after each block with the number of frames finished so far.
    """
    blocks: list[torch.Tensor] = []
    for block in iter_frames(denoiser, context, actions, num_frames, config, **options):
        blocks.append(block)
        if callback is not None:
            callback(sum(b.shape[1] for b in blocks))
    return torch.cat(blocks, dim=1)


@renamed_arguments(window_frames="in_flight")
def iter_frames(
    denoiser: Any,
    context: torch.Tensor | None,
    actions: torch.Tensor | None,
    num_frames: int,
    config: SamplerConfig | None = None,
    **options: Any,
) -> Iterator[torch.Tensor]:
    """Yield finished blocks (B, f, C, Y, X) one at a time; memory is bounded when the attention has a window.

    The noise of a frame depends on (seed, absolute frame index, sample index) only, so block by block a call that
    continues a cache goes on bit for bit as one longer call would. With several blocks in flight it does not: a call
    finishes all of them.

    Args:
        denoiser: a `Denoiser` in eval mode.
        context, actions, num_frames, config: see `Request`.
        options: further fields of `Request` by name: in_flight, seed, batch, guide, cache, guide_cache.

    Raises:
        ValueError: shapes that do not agree, `in_flight` breaks its rule, or a guide is missing or not used.
    """
    request = Request(
        num_frames=num_frames, context=context, actions=actions, config=config or SamplerConfig(), **options
    )
    return _Run(denoiser, request).blocks()


def generate_window(
    denoiser: Any,
    context: torch.Tensor | None,
    actions: torch.Tensor | None,
    num_frames: int,
    window_frames: int,
    config: SamplerConfig | None = None,
    **options: Any,
) -> torch.Tensor:
    """Deprecated: `generate` with in_flight."""
    warn_renamed("generate_window", "generate(..., in_flight=...)")
    return generate(denoiser, context, actions, num_frames, config, in_flight=window_frames, **options)


def check_trained_for_window(state: Mapping[str, Any]) -> None:
    """Deprecated: `check_independent_levels`."""
    warn_renamed("check_trained_for_window", "check_independent_levels")
    check_independent_levels(state)


def check_independent_levels(state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose network was not trained with several noise levels in one sequence.

    Args:
        state: state.json of the checkpoint, the third result of `load_denoiser`.

    Raises:
        ValueError: the objective is not "forcing".
    """
    saved = state.get("train_config", {}).get("objective", "teacher_forcing")
    objective = current_value("objective", saved, warn=False)
    if objective != "forcing":
        raise ValueError(
            "in_flight: must be None unless the network was trained with an independent noise level for every frame "
            f"(sae train --objective forcing), got a checkpoint with objective {objective!r}"
        )


def first_step(block: int, steps: int, in_flight: int) -> int:
    """The step before which a block starts from noise: no more than `in_flight` are in flight at a time."""
    return block * steps // in_flight


class _Run:
    """One request: networks with their caches (the guide last), and the F frames in flight.

    `x` (B, F, C, Y, X) are these frames, each after as many steps as `steps` (F,) says; `last_x0` is the network's
    estimate of them before their last step. The first of them is frame `first` of the request.
    """

    def __init__(self, denoiser: Any, request: Request) -> None:
        self.batch, config = request.check(denoiser), request.config
        self.request, self.config = request, config
        pairs = [(denoiser, request.cache)] + ([] if request.guide is None else [(request.guide, request.guide_cache)])
        self.networks = [(net, net.new_cache(self.batch) if cache is None else cache) for net, cache in pairs]
        held = [cache.frames for _, cache in self.networks]
        if held[-1] != held[0]:
            raise ValueError(f"guide_cache: must hold as many frames as cache = {held[0]}, got {held[-1]}")
        weight = next(denoiser.parameters())
        self.device, self.dtype = weight.device, torch.promote_types(torch.float32, weight.dtype)
        self.block_frames, self.frame_shape = denoiser.config.frames_per_block, _frame_shape(denoiser)
        self.actions = None if request.actions is None else request.actions.to(self.device)
        self.sigmas = sigma_schedule(config)
        self.churn = Churn(config.churn_amount, config.churn_min, config.churn_max, config.churn_noise)
        self.first = 0
        self.steps = torch.zeros(0, dtype=torch.long)
        self.x = torch.zeros(self.batch, 0, *self.frame_shape, dtype=self.dtype, device=self.device)
        self.last_x0 = self.x

    def blocks(self) -> Iterator[torch.Tensor]:
        f, steps, context = self.block_frames, self.config.sampling_steps, self.request.context
        if context is not None and context.shape[1]:
            self.append(context.to(self.device, self.dtype))
        in_flight = (self.request.in_flight or f) // f
        blocks, entered = self.request.num_frames // f, 0
        for step in itertools.count():
            if entered < blocks and first_step(entered, steps, in_flight) == step:
                self.enter()
                entered += 1
            if not len(self.steps):
                return
            finished = self.advance()
            if finished is not None:
                yield finished

    @torch.no_grad()
    def append(self, x: torch.Tensor) -> None:
        """Add the request's next frames, given or finished, to every cache at the context's noise level."""
        frames, config = x.shape[1], self.config
        if config.context_noise:
            x = x + config.context_noise * self.noise([_CONTEXT_DRAW] * frames)
        levels = torch.full((1, frames), config.context_sigma, dtype=torch.float64)
        for network, cache in self.networks:
            network.prefill(x, self.told(levels), self.caused_by(frames), cache)
        self.first += frames

    @torch.no_grad()
    def enter(self) -> None:
        """A block of pure noise, behind the others, around what the network expects of frames after its cache."""
        new = self.sigmas[0].item() * self.noise([0] * self.block_frames, ahead=len(self.steps))
        network, cache = self.networks[0]
        mean = network.expected(cache)
        new = new if mean is None else new + mean.to(new)[:, None]
        self.steps = torch.cat([self.steps, torch.zeros(self.block_frames, dtype=torch.long)])
        self.x = torch.cat([self.x, new], dim=1)
        self.last_x0 = torch.cat([self.last_x0, torch.zeros_like(new)], dim=1)

    @torch.no_grad()
    def advance(self) -> torch.Tensor | None:
        """One step of every block; when the first block is done, it moves into the cache.

        The second evaluation of the others already has it in the cache, where they will see it from then on.
        """
        before, then = (Sigma(self.sigmas[(self.steps + k).clamp(min=0)][None]) for k in (-1, 1))
        now: Level = Sigma(self.sigmas[self.steps][None])
        last, x, steps = At(self.x, before, self.last_x0), self.x, self.steps + 1

        def normals() -> torch.Tensor:
            return self.noise(steps.tolist())

        if self.churn.amount:
            x, now = self.churn.add(x, now, self.config.sampling_steps, normals)
        begin = At(x, now, self.estimate(x, now))
        x = STEPS[self.config.solver](begin, then, last, normals)
        finished = None
        if steps[0] == self.config.sampling_steps:
            f = self.block_frames
            finished, x, steps = x[:, :f].clone(), x[:, f:], steps[f:]
            begin = At(begin.x[:, f:], Sigma(now.noise[:, f:]), begin.x0[:, f:])
            then = Sigma(then.noise[:, f:])
            self.append(finished)
        if len(steps) and self.config.solver in CORRECTED:
            x = trapezoid(begin, At(x, then, self.estimate(x, then)))
        self.x, self.steps, self.last_x0 = x, steps, begin.x0
        return finished

    def estimate(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """D of the frames in flight, or D_weak + w (D - D_weak) under guidance."""
        levels, actions = self.told(level.noise), self.caused_by(x.shape[1])

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

    def noise(self, draws: Sequence[int], ahead: int = 0) -> torch.Tensor:
        """Normals (B, F, C, Y, X) of the frames after the cache and `ahead` others, with a draw number for each."""
        frames = list(enumerate(draws, start=self.networks[0][1].frames + ahead))
        rows = [
            token_noise_eps(
                self.frame_shape, seed=self.request.seed, device=self.device, dtype=torch.float32,
                offset=(frame << (_SAMPLE_BITS + _DRAW_BITS)) | (sample << _DRAW_BITS) | draw,
            )
            for sample in range(self.batch) for frame, draw in frames
        ]  # fmt: skip
        return torch.stack(rows).view(self.batch, len(draws), *self.frame_shape).to(self.dtype)

    def told(self, sigma: torch.Tensor) -> torch.Tensor:
        """Noise levels (1, F) as the network takes them."""
        return sigma.to(self.device, self.dtype, non_blocking=True).repeat(self.batch, 1)

    def caused_by(self, frames: int) -> torch.Tensor | None:
        """The actions of the request's next frames."""
        return None if self.actions is None else self.actions[:, self.first : self.first + frames]


def _frame_shape(denoiser: Any) -> tuple[int, int, int]:
    return denoiser.config.channels, denoiser.config.height, denoiser.config.width
