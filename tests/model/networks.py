"""Small networks and data for the model tests."""

from __future__ import annotations

from functools import lru_cache

import torch
from sae_diffusion.model import Denoiser, ModelConfig

SMALL = {
    "height": 8,
    "width": 8,
    "channels": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "blocks_per_level": 1,
    "video_attention": (4,),
    "frame_attention": (8,),
    "head_dim": 8,
    "num_actions": 3,
}


@lru_cache(maxsize=64)
def small(**changes) -> Denoiser:
    """A small fp64 denoiser in eval mode whose gains and gates are all far from their initial zeros.

    Shared between tests: do not change it.
    """
    return fresh(**changes)


def fresh(**changes) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Denoiser(ModelConfig(**(SMALL | changes))).double().eval()
        randomise_gains(net)
    return net


def randomise_gains(net: Denoiser) -> None:
    """Gains, gate slopes, offsets and limits: everything that is not a weight; gates then reach from 0.1 to 0.9."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("limits"):
                p.copy_(torch.tensor([-2.0, 2.0]))
            elif p.ndim < 2:
                p.add_(torch.empty_like(p).uniform_(0.5, 1.0))


def clip(net: Denoiser, batch: int, frames: int, streams: int = 1, seed: int = 0):
    """x (B, streams * T, C, Y, X), sigma (B, streams * T), actions (B, T), in fp64."""
    c = net.config
    g = torch.Generator().manual_seed(seed)
    total = streams * frames
    x = torch.randn(batch, total, c.channels, c.height, c.width, generator=g, dtype=torch.float64)
    sigma = torch.randn(batch, total, generator=g, dtype=torch.float64).exp()
    if c.num_actions:
        actions = torch.randint(-1, c.num_actions, (batch, frames), generator=g)
    elif c.action_dim:
        actions = torch.randn(batch, frames, c.action_dim, generator=g, dtype=torch.float64)
        actions[:, 0] = float("nan")
    else:
        actions = None
    return x, sigma, actions


def changed_frames(net: Denoiser, x, sigma, actions, frame: int, **kwargs) -> torch.Tensor:
    """Bool (F,): which output frames are not bit-identical after replacing input frame `frame` (another sigma too)."""
    x2, sigma2 = x.clone(), sigma.clone()
    x2[:, frame] = torch.randn_like(x2[:, frame])
    sigma2[:, frame] *= 1.5
    with torch.no_grad():
        before, after = net(x, sigma, actions, **kwargs), net(x2, sigma2, actions, **kwargs)
    return (before != after).flatten(2).any(-1).any(0)


def cut(actions, start: int, end: int):
    return None if actions is None else actions[:, start:end]


def compositions(n: int) -> list[tuple[int, ...]]:
    """All ordered ways to write n as a sum of positive integers."""
    if n == 0:
        return [()]
    return [(first, *rest) for first in range(1, n + 1) for rest in compositions(n - first)]
