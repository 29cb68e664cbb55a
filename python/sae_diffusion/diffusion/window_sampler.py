"""Sampling with several frames in flight: a window of frames rolls over the video, each at its own noise level.

Block k of f frames starts from noise after k N / W steps (rounded down) and takes the N noise levels of
`sigma_schedule`, one for each step of the whole window, so that W blocks are in flight at a time and the first of them
is done first. Where W divides N this is `schedules.Triangular(blocks, N, N // W)` in the "ve" scaling; W = 1 is
`sampler.iter_frames`, block by block. The network sees finished frames through its cache, and the blocks in flight
with their own noise levels: it must have been trained with independent ones (`sae train --objective forcing`).

A window of W blocks needs about N / W passes for each new block instead of N, each over W blocks. It is exact for
W = 1 only: a block in flight does not look at those after it, which is what makes room for new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .sampler import BlockSampler, SamplerConfig, check_request


def iter_window(
    denoiser: Any,
    context: torch.Tensor | None,
    actions: torch.Tensor | None,
    num_frames: int,
    window_frames: int,
    config: SamplerConfig | None = None,
    *,
    seed: int = 0,
    guide: Any = None,
    cache: Any = None,
    guide_cache: Any = None,
    batch: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield finished blocks (B, f, C, Y, X) in order; at most `window_frames` unfinished frames are held.

    Noise is numbered as in `sampler.iter_frames`, so window_frames = f gives the same frames bit for bit.

    Args:
        denoiser: a `Denoiser` in eval mode, trained with independent noise levels (see `check_trained_for_window`).
        actions: known for all frames from the start, as frames in flight need theirs.
        window_frames: W f, a multiple of the f frames of a block; W at most config.sampling_steps.
        context, num_frames, config, seed, guide, cache, guide_cache, batch: as in `sampler.iter_frames`.

    Raises:
        ValueError: as `sampler.iter_frames`, or a window that breaks its rule.
    """
    config = config or SamplerConfig()
    networks, batch = check_request(
        denoiser, context, actions, num_frames, config, guide=guide, cache=cache, guide_cache=guide_cache, batch=batch
    )
    block_frames = denoiser.config.frames_per_block
    if window_frames < 1 or window_frames % block_frames:
        raise ValueError(
            f"window_frames: must be a positive multiple of frames_per_block = {block_frames}, got {window_frames}"
        )
    if window_frames // block_frames > config.sampling_steps:
        raise ValueError(
            f"window_frames: at most sampling_steps = {config.sampling_steps} blocks can be in flight, one for each "
            f"noise level, got {window_frames // block_frames}"
        )
    return WindowSampler(networks, config, seed, batch, window_frames // block_frames).run(context, actions, num_frames)


def generate_window(
    denoiser: Any,
    context: torch.Tensor | None,
    actions: torch.Tensor | None,
    num_frames: int,
    window_frames: int,
    config: SamplerConfig | None = None,
    *,
    callback: Callable[[int], None] | None = None,
    **options: Any,
) -> torch.Tensor:
    """All frames (B, num_frames, C, Y, X) of `iter_window`; `callback` is called with the number done so far."""
    blocks: list[torch.Tensor] = []
    for block in iter_window(denoiser, context, actions, num_frames, window_frames, config, **options):
        blocks.append(block)
        if callback is not None:
            callback(sum(b.shape[1] for b in blocks))
    return torch.cat(blocks, dim=1)


def check_trained_for_window(state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose training never showed the network several noise levels in one sequence.

    Args:
        state: state.json of the checkpoint, the third result of `load_denoiser`.

    Raises:
        ValueError: its objective is not "forcing".
    """
    objective = state.get("train_config", {}).get("objective", "teacher")
    if objective != "forcing":
        raise ValueError(
            "window_frames: needs a network trained with an independent noise level for every frame "
            f"(sae train --objective forcing), this checkpoint has objective {objective!r}"
        )


def first_step(block: int, steps: int, window: int) -> int:
    """The step before which a block enters the window: no more than `window` are in it at a time."""
    return block * steps // window


@dataclass
class _Block:
    """A block in flight: x (B, f, C, Y, X) after `step` of its steps."""

    x: torch.Tensor
    actions: torch.Tensor | None
    step: int = 0


class WindowSampler(BlockSampler):
    """One run with `window` blocks in flight."""

    def __init__(
        self, networks: list[tuple[Any, Any]], config: SamplerConfig, seed: int, batch: int, window: int
    ) -> None:
        super().__init__(networks, config, seed, batch)
        self.window = window

    def run(
        self, context: torch.Tensor | None, actions: torch.Tensor | None, num_frames: int
    ) -> Iterator[torch.Tensor]:
        done = self.start(context, actions)
        blocks = num_frames // self.block_frames
        flight: list[_Block] = []
        entered = step = 0
        while entered < blocks or flight:
            if entered < blocks and first_step(entered, self.config.sampling_steps, self.window) == step:
                flight.append(self.enter(done + entered * self.block_frames, actions, len(flight)))
                entered += 1
            finished = self.advance(flight)
            step += 1
            if finished is not None:
                yield finished

    def enter(self, start: int, actions: torch.Tensor | None, place: int) -> _Block:
        """A block of pure noise behind `place` others."""
        caused_by = None if actions is None else self.on_device(actions[:, start : start + self.block_frames])
        return _Block(self.sigmas[0] * self.noise(self.block_frames, 0, place * self.block_frames), caused_by)

    @torch.no_grad()
    def advance(self, flight: list[_Block]) -> torch.Tensor | None:
        """One step of every block (EDM algorithm 2); the first one, when it is done, moves into the cache.

        Those behind it take their second evaluation with it in the cache already, as they will see it from then on.
        """
        finished, slopes, taken = None, [], []
        for place, block in enumerate(flight):
            ahead = place * self.block_frames
            block.x, sigma = self.churned(block.x, self.sigmas[block.step], block.step, ahead)
            block.step += 1
            taken.append((sigma, self.sigmas[block.step]))
        estimates = self.together(flight, [block.x for block in flight], [sigma for sigma, _ in taken])
        ends = []
        for block, estimate, (sigma, next_sigma) in zip(flight, estimates, taken):
            slopes.append((block.x - estimate) / sigma)
            ends.append(block.x + (next_sigma - sigma) * slopes[-1])
        if flight[0].step == self.config.sampling_steps:
            finished = ends.pop(0)
            self.append(finished, flight.pop(0).actions)
            del slopes[0], taken[0]
        if flight and self.config.solver == "heun":
            estimates = self.together(flight, ends, [next_sigma for _, next_sigma in taken])
            for i, (block, estimate, (sigma, next_sigma)) in enumerate(zip(flight, estimates, taken)):
                next_slope = (ends[i] - estimate) / next_sigma
                ends[i] = block.x + (next_sigma - sigma) * 0.5 * (slopes[i] + next_slope)
        for block, x in zip(flight, ends):
            block.x = x
        return finished

    def together(self, flight: list[_Block], xs: list[torch.Tensor], sigmas: list[float]) -> tuple[torch.Tensor, ...]:
        """The estimate of each block, in one pass."""
        levels = torch.cat([self.levels(sigma, self.block_frames) for sigma in sigmas], dim=1)
        told = [block.actions for block in flight if block.actions is not None]
        x = torch.cat(xs, dim=1)
        return self.estimate(x, levels, torch.cat(told, dim=1) if told else None).split(self.block_frames, dim=1)
