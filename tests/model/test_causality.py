"""Which frames can reach which, through the whole network with every gain and gate at work, by exact equality."""

from __future__ import annotations

import pytest
import torch
from networks import changed_frames, clip, fresh, small

T = 5
ATTENTION = {"full": {}, "window": {"window": 1}, "window_sink": {"window": 1, "sink": 1}}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("copies", [0, 1, 3])
@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_clean_frame_reaches_only_later_frames(mixing, copies, attention):
    net = small(temporal_mixing=mixing, **ATTENTION[attention])
    x, sigma, actions = clip(net, 2, T, 1 + copies)
    for j in (0, 1, 3, 4):
        changed = changed_frames(net, x, sigma, actions, j, noisy_copies=copies).reshape(1 + copies, T)
        expected = torch.zeros(1 + copies, T, dtype=torch.bool)
        expected[0, j:] = True
        expected[1:, j + 1 :] = True
        assert torch.equal(changed, expected), f"clean frame {j}: {changed.int().tolist()}"


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_noisy_frame_reaches_only_itself(mixing, copies):
    net = small(temporal_mixing=mixing)
    x, sigma, actions = clip(net, 2, T, 1 + copies)
    for frame in (T, T + 3, (1 + copies) * T - 1):
        changed = changed_frames(net, x, sigma, actions, frame, noisy_copies=copies)
        assert changed.nonzero().flatten().tolist() == [frame]


@pytest.mark.parametrize("frames", [4, 5])
@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_blocks_of_two_frames(mixing, frames):
    net = small(temporal_mixing=mixing, frames_per_block=2)
    x, sigma, actions = clip(net, 1, frames, 3)
    for j in range(frames):
        changed = changed_frames(net, x, sigma, actions, j, noisy_copies=2).reshape(3, frames)
        start, end = j // 2 * 2, j // 2 * 2 + 2
        assert not changed[0, :start].any() and changed[0, start:].all()
        assert not changed[1:, :end].any() and changed[1:, end:].all()
        changed = changed_frames(net, x, sigma, actions, frames + j, noisy_copies=2).reshape(3, frames)
        assert changed[1, start:end].all() and changed.sum() == min(end, frames) - start


@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_spatial_only_frames_are_independent(mixing):
    net = small(temporal_mixing=mixing)
    x, sigma, actions = clip(net, 2, 7)
    for frame in (0, 3, 6):
        changed = changed_frames(net, x, sigma, actions, frame, spatial_only=True)
        assert changed.nonzero().flatten().tolist() == [frame]
    with torch.no_grad():
        together = net(x, sigma, actions, spatial_only=True)
        for i in range(7):
            alone = net(x[:, i : i + 1], sigma[:, i : i + 1], actions[:, i : i + 1], spatial_only=True)
            torch.testing.assert_close(alone, together[:, i : i + 1], rtol=0, atol=1e-12)


def test_videos_of_a_batch_are_independent():
    net = small(temporal_mixing="gated")
    x, sigma, actions = clip(net, 3, 4, 2)
    x2, sigma2 = x.clone(), sigma.clone()
    x2[1] = torch.randn_like(x2[1])
    sigma2[1] *= 2
    with torch.no_grad():
        before, after = net(x, sigma, actions), net(x2, sigma2, actions)
        assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])
        alone = net(x[2:], sigma[2:], actions[2:])
        torch.testing.assert_close(alone, before[2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_noisy_copies_equal_separate_passes(mixing):
    net = small(temporal_mixing=mixing)
    x, sigma, actions = clip(net, 2, T, 4)
    with torch.no_grad():
        together = net(x, sigma, actions, noisy_copies=3)
        for k in range(1, 4):
            frames = [*range(T), *range(k * T, (k + 1) * T)]
            alone = net(x[:, frames], sigma[:, frames], actions)
            torch.testing.assert_close(alone, together[:, frames], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_gradient_reaches_every_parameter(mixing):
    net = fresh(temporal_mixing=mixing, patch_size=2, height=16, width=16).train()
    x, sigma, actions = clip(net, 2, 3, 2)
    net(x, sigma, actions)[:, 3:].square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        # Every output channel of every weight, not only some element.
        rows = p.grad.flatten(1) if p.ndim > 1 else p.grad.reshape(1, -1)
        assert (rows != 0).any(dim=1).all(), name
