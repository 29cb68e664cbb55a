"""Frames in flight: the cached pass over several noisy frames against the plain causal pass that trains them."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import clip, cut, fresh, small

CASES = [
    {},
    {"temporal_mixing": "gated"},
    {"window": 2},
    {"window": 2, "sink": 1},
    {"window": 1, "sink": 2},
    {"window": 0},
    {"window": 3, "temporal_mixing": "gated", "num_actions": 0, "action_dim": 2},
    {"frames_per_block": 2},
    {"frames_per_block": 2, "window": 1, "sink": 1, "num_actions": 0},
]
IDS = ["-".join(f"{k}{v}" for k, v in case.items()) or "plain" for case in CASES]


def run_cached(net, x, sigma, actions, cached: int, batch: int = 2):
    cache = net.new_cache(batch)
    if cached:
        net.prefill(x[:, :cached], sigma[:, :cached], cut(actions, 0, cached), cache)
    return net.denoise_sequence(x[:, cached:], sigma[:, cached:], cut(actions, cached, x.shape[1]), cache), cache


@pytest.mark.parametrize("changes", CASES, ids=IDS)
@pytest.mark.parametrize("cached", [0, 2, 4, 6])
def test_flight_is_the_end_of_the_plain_causal_pass(changes, cached):
    net = small(**changes)
    x, sigma, actions = clip(net, 2, 8)
    with torch.no_grad():
        want = net(x, sigma, actions, noisy_copies=0)[:, cached:]
    got, cache = run_cached(net, x, sigma, actions, cached)
    assert cache.frames == cached
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"window": 1, "sink": 1}], ids=["all", "window"])
def test_flight_leaves_the_cache_as_it_was(changes):
    net = small(**changes)
    x, sigma, actions = clip(net, 1, 7)
    cache = net.new_cache(1)
    net.prefill(x[:, :3], sigma[:, :3], actions[:, :3], cache)
    twin = copy.deepcopy(cache)
    buffers = {name: t.data_ptr() for name, t in cache.tensors().items()}
    for n in (1, 3, 4):
        net.denoise_sequence(x[:, 3 : 3 + n], sigma[:, 3 : 3 + n], actions[:, 3 : 3 + n], cache)
    assert cache.frames == 3
    assert {name: t.data_ptr() for name, t in cache.tensors().items()} == buffers
    for call in (net.denoise, net.prefill, net.denoise):
        one = call(x[:, 6:], sigma[:, 6:], actions[:, 6:], cache)
        assert torch.equal(one, call(x[:, 6:], sigma[:, 6:], actions[:, 6:], twin))


@pytest.mark.parametrize("block", [1, 2])
def test_flight_of_one_block_is_denoise(block):
    net = small(frames_per_block=block, temporal_mixing="gated")
    x, sigma, actions = clip(net, 2, 2 + block)
    flight, cache = run_cached(net, x, sigma, actions, 2)
    one = net.denoise(x[:, 2:], sigma[:, 2:], actions[:, 2:], cache)
    torch.testing.assert_close(flight, one, rtol=0, atol=1e-12)


def test_a_frame_in_flight_sees_those_before_it_only():
    net = small()
    x, sigma, actions = clip(net, 1, 5)
    before, _ = run_cached(net, x, sigma, actions, 2, batch=1)
    x[:, 3] += 1.0
    sigma[:, 3] *= 2
    after, _ = run_cached(net, x, sigma, actions, 2, batch=1)
    changed = (before != after).flatten(2).any(-1)[0].tolist()
    assert changed == [False, True, True]


def test_gradients_are_off_and_wrong_frames_are_refused():
    net = fresh(frames_per_block=2)
    x, sigma, _ = clip(net, 1, 3)
    cache = net.new_cache(1)
    assert not net.denoise_sequence(x[:, :2], sigma[:, :2], None, cache).requires_grad
    for n in (0, 3):
        with pytest.raises(ValueError, match=rf"x: frames must be a positive multiple .* = 2, got {n}"):
            net.denoise_sequence(x[:, :n], sigma[:, :n], None, cache)
    with pytest.raises(ValueError, match=r"cache: must be for the batch of x = ., got one for 1"):
        net.denoise_sequence(x[:, :2].repeat(2, 1, 1, 1, 1), sigma[:, :2].repeat(2, 1), None, cache)
