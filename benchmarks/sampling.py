"""Generating one more frame: with the cache, without its past terms, and without a cache."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from sae_diffusion.diffusion.sampler import SamplerConfig, generate
from sae_diffusion.model import Denoiser
from sae_diffusion.model.cache import ConvEntry

from . import gate, measure, naive, train_step
from .registry import Case, Contender, Problem

# preset, B videos, context frames, steps (noise levels; a frame costs 2 steps - 1 evaluations, and one for the cache).
CASES = [
    Case("sampling", "lunar-lander", "the lunar-lander preset after 15 frames of context",
         {"preset": "lunar-lander", "B": 1, "context": 15, "steps": 16, "dtype": "bf16"},
         {"preset": "lunar-lander", "B": 1, "context": 15, "steps": 2}, 7, True, cpu_priority=91),
    Case("sampling", "tiny", "the preset of the demo after 15 frames of context",
         {"preset": "tiny", "B": 1, "context": 15, "steps": 16, "dtype": "bf16"},
         {"preset": "tiny", "B": 1, "context": 15, "steps": 8}, 36),
    Case("sampling", "smoke", "a second for everything", None,
         {"preset": "nano", "B": 1, "context": 2, "steps": 1}, dry=True),
]  # fmt: skip


class Recomputing:
    """A denoiser that keeps frames instead of layers' state, and runs the whole context at every evaluation."""

    def __init__(self, model: Denoiser, context: int) -> None:
        self.model, self.config, self.context = model, model.config, context

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self.model.parameters()

    def new_cache(self, batch: int) -> Frames:
        return Frames(batch)

    def expected(self, cache: Frames) -> torch.Tensor | None:
        if not cache.seen:
            return None
        x, sigma = (t[:, -1:] for t in cache.seen)
        prior = self.model.prior(x, sigma, (x[:, 0], sigma[:, 0]))
        return None if prior is None else prior[0][:, 0]

    def prefill(self, x: torch.Tensor, sigma: torch.Tensor, actions: None, cache: Frames) -> None:
        cache.frames += x.shape[1]
        cache.seen = tuple(t[:, -self.context :] for t in cache.followed_by(x, sigma))

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, actions: None, cache: Frames) -> torch.Tensor:
        # Without noisy copies the last frame sees what its noisy copy would: the frames before it, and itself.
        return self.model(*cache.followed_by(x, sigma), noisy_copies=0)[:, -1:]


@dataclass
class Frames:
    """What `Recomputing` remembers: (x, sigma) of the last frames, or nothing."""

    batch: int
    frames: int = 0
    seen: tuple[torch.Tensor, ...] = ()

    def followed_by(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.seen:
            return x, sigma
        return tuple(torch.cat(pair, dim=1) for pair in zip(self.seen, (x, sigma)))


def past_recomputed():
    """Inside, a convolution's past term is computed at every evaluation, not once for each frame."""
    return mock.patch.object(ConvEntry, "past", lambda entry, compute: compute(entry.history))


def build(shape: Mapping[str, Any], device: str) -> Problem:
    naive.forget()
    context, B, dtype = shape["context"], shape["B"], shape.get("dtype", "fp32")
    # A window as long as the context keeps the cost of a frame the same from call to call.
    config = dataclasses.replace(train_step.config_of(shape), window=context)
    model = train_step.network(config, device).eval()
    sampler = SamplerConfig(sampling_steps=shape["steps"])
    frames = torch.randn(B, context, config.channels, config.height, config.width, device=device)
    labels = torch.full((B, context), sampler.context_sigma, device=device)
    caches: dict[str, Any] = {}

    def next_frame(name: str, denoiser: Any) -> Callable[[Any], torch.Tensor]:
        def run(_: Any) -> torch.Tensor:
            if name not in caches:
                caches[name] = denoiser.new_cache(B)
                with train_step.precision(device, dtype):
                    denoiser.prefill(frames, labels, None, caches[name])
            with train_step.precision(device, dtype):
                return generate(denoiser, None, None, 1, sampler, cache=caches[name], batch=B)

        return run

    with_cache, with_poor_cache = next_frame("cache", model), next_frame("without past terms", model)

    def without_past_terms(inputs: Any) -> torch.Tensor:
        with past_recomputed():
            return with_poor_cache(inputs)

    recomputing = Recomputing(model, context)
    contenders = [
        Contender("cache with past terms", {"sample": with_cache}, "ours"),
        Contender("cache without past terms", {"sample": without_past_terms}),
        Contender("no cache", {"sample": next_frame("none", recomputing)}),
    ]

    made: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def check(contender: Contender, direction: str) -> None:
        x = torch.randn(B, 1, *frames.shape[2:], generator=torch.Generator().manual_seed(1)).to(device)
        sigma = torch.ones(B, 1, device=device)

        def one(denoiser: Any, precision: str) -> torch.Tensor:
            cache, wide = denoiser.new_cache(B), torch.float64 if precision == "fp64" else torch.float32
            with train_step.precision(device, precision):
                denoiser.prefill(frames.to(wide), labels.to(wide), None, cache)
                return denoiser.denoise(x.to(wide), sigma.to(wide), None, cache)

        if not made:
            wide = train_step.network(config, device).eval().double()
            with naive.swapped(naive.TWO_PASSES, naive.dense_attention):
                made["gold"] = one(Recomputing(wide, context), "fp64")
                made["eager"] = one(recomputing, dtype)
        layers = sum(isinstance(m, naive.model_conv.CausalConv) for m in model.modules())
        with past_recomputed() if "without" in contender.name else contextlib.nullcontext():
            out = one(recomputing if contender.name == "no cache" else model, dtype).to(measure.DTYPES[dtype])
        gate.hold(contender, {"D": out}, {"D": made["gold"]}, {"D": made["eager"]}, roundings=4.0 * layers)

    return Problem(lambda i: {}, contenders, check, dtype, unit="frame", largest_sets=1)
