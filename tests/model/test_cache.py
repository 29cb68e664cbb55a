"""The cache: bounded, never copied, never changed by an evaluation, keyed by path."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import clip, cut, fresh, small
from sae_diffusion.model import conv as conv_module
from sae_diffusion.model.cache import AttentionEntry


def fill(net, frames: int, batch: int = 1):
    x, sigma, actions = clip(net, batch, frames + 2)
    cache = net.new_cache(batch)
    if frames:
        net.prefill(x[:, :frames], sigma[:, :frames], cut(actions, 0, frames), cache)
    return cache, x[:, frames:], sigma[:, frames:], cut(actions, frames, frames + 2)


@pytest.mark.parametrize("mixing", ["joint", "gated"])
@pytest.mark.parametrize("window", [None, 2])
def test_evaluations_neither_copy_nor_change_the_cache(mixing, window, monkeypatch):
    net = small(temporal_mixing=mixing, window=window)
    cache, x, sigma, actions = fill(net, 3)
    read = []
    with_own = AttentionEntry.with_own

    def recorded(entry, *args):
        keys, values = with_own(entry, *args)
        read.append((keys.data_ptr(), values.data_ptr()) == (entry.keys.data_ptr(), entry.values.data_ptr()))
        return keys, values

    monkeypatch.setattr(AttentionEntry, "with_own", recorded)
    net.denoise(x[:, :1], sigma[:, :1], actions[:, :1], cache)
    assert read and all(read)  # attention reads the buffers themselves
    pointers = {name: t.data_ptr() for name, t in cache.tensors().items()}
    twin = copy.deepcopy(cache)
    for i in range(4):
        net.denoise(torch.randn_like(x[:, :1]), sigma[:, :1] * (i + 2), actions[:, 1:], cache)
    assert {name: t.data_ptr() for name, t in cache.tensors().items()} == pointers
    assert cache.frames == 3
    # What later calls see: the same as from a cache that never saw the four evaluations.
    for call in (net.denoise, net.prefill, net.denoise):
        a = call(x[:, :1], sigma[:, :1], actions[:, :1], cache)
        b = call(x[:, :1], sigma[:, :1], actions[:, :1], twin)
        assert torch.equal(a, b)


def test_past_terms_are_computed_once_for_each_frame(monkeypatch):
    net = small()
    cache, x, sigma, actions = fill(net, 2)
    calls = []
    original = conv_module.past_term
    monkeypatch.setattr(conv_module, "past_term", lambda *a, **k: calls.append(1) or original(*a, **k))
    convolutions = sum(isinstance(m, conv_module.CausalConv) for m in net.modules())
    for frame in (1, 2):
        for _ in range(3):
            net.denoise(x[:, :1], sigma[:, :1], actions[:, :1], cache)
        assert len(calls) == frame * convolutions
        net.prefill(x[:, :1], sigma[:, :1], actions[:, :1], cache)


@pytest.mark.parametrize(("window", "sink"), [(2, 0), (2, 1), (0, 1), (0, 0)])
def test_memory_is_bounded_by_the_window(window, sink):
    net = small(window=window, sink=sink)
    cache, x, sigma, actions = fill(net, 1)
    sizes = set()
    for _ in range(12):
        net.denoise(x[:, :1], sigma[:, :1], actions[:, :1], cache)
        net.prefill(x[:, :1], sigma[:, :1], actions[:, :1], cache)
        sizes.add(cache.nbytes)
    assert len(sizes) == 1
    keys = next(t for name, t in cache.tensors().items() if name.endswith("keys"))
    assert keys.shape[2] == (window + sink + 1) * 16  # 4x4 tokens


def test_without_a_window_capacity_doubles():
    net = small()
    cache, x, sigma, actions = fill(net, 1)
    capacities = []
    for _ in range(16):
        net.prefill(x[:, :1], sigma[:, :1], actions[:, :1], cache)
        keys = next(t for name, t in cache.tensors().items() if name.endswith("keys"))
        capacities.append(keys.shape[2] // 16)
    assert sorted(set(capacities)) == [4, 8, 16, 32]


def test_entries_are_keyed_by_path():
    net = small()
    cache, *_ = fill(net, 1)
    modules = dict(net.named_modules())
    names = {name.rsplit(".", 1)[0] for name in cache.tensors()}
    with_past = {n for n, m in modules.items() if hasattr(m, "key")}
    assert names == with_past and all(modules[n].key == n for n in with_past)


def test_two_caches_do_not_mix():
    net = small(temporal_mixing="gated")
    x, sigma, actions = clip(net, 2, 4, 2)
    with torch.no_grad():
        expected = net(x, sigma, actions)
    caches = [net.new_cache(1), net.new_cache(1)]
    for i in range(4):
        for b, cache in enumerate(caches):
            one = slice(b, b + 1)
            args = actions[one, i : i + 1], cache
            noisy = net.denoise(x[one, 4 + i : 5 + i], sigma[one, 4 + i : 5 + i], *args)
            torch.testing.assert_close(noisy, expected[one, 4 + i : 5 + i], rtol=0, atol=1e-10)
            net.prefill(x[one, i : i + 1], sigma[one, i : i + 1], *args)


def test_buffers_have_the_compute_dtype():
    net = fresh().float()
    x, sigma, actions = clip(net, 1, 2)
    cache = net.new_cache(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert net.prefill(x, sigma, actions, cache).dtype == torch.float32
        before = cache.nbytes
        assert net.denoise(x[:, :1], sigma[:, :1], actions[:, :1], cache).dtype == torch.float32
    assert cache.nbytes == before
    dtypes = {name.rsplit(".", 1)[1]: t.dtype for name, t in cache.tensors().items() if "conv_in" not in name}
    assert dtypes == {"history": torch.bfloat16, "keys": torch.bfloat16, "values": torch.bfloat16}


def test_errors_name_what_is_wrong():
    net = small(frames_per_block=2)
    x, sigma, actions = clip(net, 1, 4)
    cache = net.new_cache(1)
    with pytest.raises(ValueError, match=r"frames must be a positive multiple of frames_per_block = 2, got 3"):
        net.prefill(x[:, :3], sigma[:, :3], actions[:, :3], cache)
    with pytest.raises(ValueError, match=r"frames must be 1 to frames_per_block = 2, got 3"):
        net.denoise(x[:, :3], sigma[:, :3], actions[:, :3], cache)
    with pytest.raises(ValueError, match=r"cache: must be for the batch of x = 1, got one for 3"):
        net.prefill(x, sigma, actions, net.new_cache(3))
    with pytest.raises(ValueError, match=r"cache: must be from new_cache"):
        net.prefill(x, sigma, actions, small(frames_per_block=2, window=1).new_cache(1))
