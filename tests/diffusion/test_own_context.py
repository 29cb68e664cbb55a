"""The network's own frames as context: what is replaced, by what, and when."""

from __future__ import annotations

import pytest
import torch
from sae_diffusion.diffusion.config import OwnContextConfig
from sae_diffusion.diffusion.own_context import share_of_own_frames, with_own_frames
from sae_diffusion.model import ModelConfig
from torch import nn


def test_share_rises_from_the_start():
    assert share_of_own_frames(OwnContextConfig(), 10**6) == 0
    config = OwnContextConfig(start=5, ramp=4)
    assert [share_of_own_frames(config, step) for step in range(3, 11)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [share_of_own_frames(OwnContextConfig(start=5), step) for step in (4, 5)] == [0, 1]


class Answers(nn.Module):
    """Calls recorded; D of the noisy copy is 100 times the number of the call, plus the context frame before."""

    def __init__(self, frames_per_block: int = 1) -> None:
        super().__init__()
        self.config, self.calls = ModelConfig(frames_per_block=frames_per_block), []

    def forward(self, x, sigma, actions, *, noisy_copies):
        assert noisy_copies == 1 and not torch.is_grad_enabled()
        self.calls.append((x, sigma))
        context = x[:, : x.shape[1] // 2]
        before = torch.cat([torch.zeros_like(context[:, :1]), context[:, :-1]], dim=1)
        return torch.cat([context, 100.0 * len(self.calls) + before], dim=1)


def clips(batch=64, frames=6):
    return (
        torch.arange(frames, dtype=torch.float32).view(1, frames, 1, 1, 1).expand(batch, frames, 1, 2, 2).contiguous()
    )


def made(net, x0, seed=0, share=1.0, **options):
    labels = torch.full(x0.shape[:2], 0.05)
    generator = torch.Generator().manual_seed(seed)
    return with_own_frames(net, x0, None, labels, OwnContextConfig(**options), share, generator)


def test_estimates_from_recorded_frames_replace_some():
    net, x0 = Answers(), clips()
    mixed = made(net, x0, given=2)
    own = mixed != x0
    assert not own[:, :2].any()
    # whole frames are replaced, by D given the recorded frame before
    assert torch.equal(own.flatten(2).any(2), own.flatten(2).all(2))
    assert torch.equal(mixed[own], (100 + x0 - 1)[own])
    share = own[:, 2:, 0, 0, 0].double().mean(1)
    # clips have shares of their own, half on average: four standard errors of a U(0, 1) of 64 clips, 4 frames each
    assert abs(share.mean() - 0.5) < 4 * (1 / 12 / 64 + 1 / 4 / 256) ** 0.5
    assert (share == 0).any() and (share == 1).any()
    x, sigma = net.calls[0]
    assert torch.equal(x[:, :6], x0) and (sigma[:, :6] == 0.05).all()
    assert 3 <= sigma[:, 6:].min() < 3.3 and 13 < sigma[:, 6:].max() <= 15
    noise = (x[:, 6:] - x0) / sigma[:, 6:, None, None, None]
    assert abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5


def test_smaller_shares_replace_fewer_and_none_none():
    counts = [(made(Answers(), clips(256), share=share) != clips(256)).sum() for share in (0.0, 0.3, 1.0)]
    assert counts[0] == 0 < counts[1] < counts[2]


def test_depth_makes_them_from_a_context_with_own_frames():
    net, x0 = Answers(), clips()
    mixed = made(net, x0, depth=2, given=1)
    (first, _), (second, _) = net.calls
    assert torch.equal(first[:, :6], x0)
    context = second[:, :6]
    replaced = (context != x0).flatten(2).any(2)
    assert replaced.any() and torch.equal((mixed != x0).flatten(2).any(2), replaced)
    for b, t in replaced.nonzero().tolist():
        assert (mixed[b, t] == 200 + context[b, t - 1]).all()


def test_steps_lead_to_lower_levels():
    net, x0 = Answers(), clips()
    made(net, x0, steps=4)
    levels = torch.stack([sigma[:, 6:] for _, sigma in net.calls])
    torch.testing.assert_close(levels, levels[0] * torch.tensor([1, 0.75, 0.5, 0.25]).view(4, 1, 1))
    # an Euler step keeps the noise that D leaves, in proportion to the level
    (before, sigma), (after, lower) = net.calls[:2]
    d = 100 + torch.cat([torch.zeros_like(x0[:, :1]), x0[:, :-1]], dim=1)
    ratio = (lower / sigma)[:, 6:, None, None, None]
    torch.testing.assert_close(after[:, 6:] - d, (before[:, 6:] - d) * ratio)


def test_a_block_is_replaced_as_a_whole():
    mixed, x0 = made(Answers(frames_per_block=2), clips()), clips()
    own = (mixed != x0).flatten(2).any(2)
    assert torch.equal(own[:, 2::2], own[:, 3::2]) and own.any()


def test_is_a_function_of_the_generator():
    assert torch.equal(made(Answers(), clips(), 1), made(Answers(), clips(), 1))
    assert not torch.equal(made(Answers(), clips(), 1), made(Answers(), clips(), 2))


@pytest.mark.parametrize(
    ("field", "value"),
    [("start", 0), ("ramp", -1), ("given", 0), ("steps", 0), ("depth", 0), ("sigma_min", 0.0), ("sigma_max", 1.0)],
)
def test_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        OwnContextConfig(**{field: value})
