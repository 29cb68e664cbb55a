"""Frames to the network's units and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_diffusion.data import FrameStats, open_dataset


def test_estimate_gives_unit_variance(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(5):
        frames = rng.integers(0, (40, 256, 7), (6, 4, 5, 3)).astype(np.uint8)
        np.savez(tmp_path / f"{n}.npz", frames=frames)
    clips = open_dataset(tmp_path, 6)
    stats = FrameStats.estimate(clips)
    assert not stats.latent
    everything = np.concatenate([clips[i].frames for i in range(5)]).reshape(-1, 3) / 127.5 - 1
    np.testing.assert_allclose(stats.mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, everything.std(0), rtol=1e-12)
    x = torch.stack([stats.normalize(clips[i].frames) for i in range(5)])
    assert x.shape == (5, 6, 3, 4, 5) and x.dtype == torch.float32
    torch.testing.assert_close(x.double().mean((0, 1, 3, 4)), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.double().std((0, 1, 3, 4), correction=0), torch.ones(3).double(), atol=1e-6, rtol=0)
    few = FrameStats.estimate(clips, max_clips=2)
    ends = np.stack([clips[0].frames, clips[4].frames]).reshape(-1, 3) / 127.5 - 1
    np.testing.assert_allclose(few.mean, ends.mean(0), rtol=1e-12)


def test_latents_and_constant_channels(tmp_path):
    latents = np.random.default_rng(0).normal(1000, 0.1, (6, 4, 5, 2))
    latents[..., 1] = 3
    np.savez(tmp_path / "a.npz", frames=latents)
    clips = open_dataset(tmp_path, 6)
    stats = FrameStats.estimate(clips)
    assert stats.latent and stats.std[1] == 1 and stats.mean[1] == 3
    np.testing.assert_allclose(stats.std[0], clips[0].frames[..., 0].astype(np.float64).std(), rtol=1e-9)
    back = stats.denormalize(stats.normalize(clips[0].frames))
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, torch.from_numpy(clips[0].frames))
    with pytest.raises(TypeError, match=r"floats \(latents\), got torch\.uint8"):
        stats.normalize(np.zeros((1, 2, 2, 2), np.uint8))


channel = st.tuples(st.floats(-1, 1), st.floats(1e-3, 2))


@given(channels=st.lists(channel, min_size=1, max_size=4), lead=st.integers(0, 2))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_byte_survives_the_way_there_and_back(channels, lead):
    stats = FrameStats(tuple(m for m, _ in channels), tuple(s for _, s in channels))
    c = len(channels)
    frames = np.arange(256, dtype=np.uint8).reshape(*[1] * lead, 1, 16, 16, 1).repeat(c, -1)
    x = stats.normalize(frames)
    assert x.shape == (*[1] * lead, 1, c, 16, 16)
    expected = (frames[..., 1, 2, :].astype(np.float64) / 127.5 - 1 - stats.mean) / stats.std
    np.testing.assert_allclose(x[..., 1, 2], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(stats.denormalize(x).numpy(), frames)
    np.testing.assert_array_equal(stats.denormalize(x.double()).numpy(), frames)
    assert FrameStats.from_json(stats.to_json()) == stats


def test_values_beyond_the_range_are_clamped_and_errors_name_what_came():
    stats = FrameStats((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    x = torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert stats.denormalize(x)[0, 0, 0].tolist() == [0, 128, 255]
    with pytest.raises(TypeError, match=r"uint8, got torch\.float32"):
        stats.normalize(torch.zeros(1, 2, 2, 3))
    with pytest.raises(ValueError, match=r"Y, X, 3\), got \(1, 2, 2, 4\)"):
        stats.normalize(torch.zeros(1, 2, 2, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"T, 3, Y, X\), got \(1, 2, 4, 4\)"):
        stats.denormalize(torch.zeros(1, 2, 4, 4))
    for mean, std in (((0.0,), (0.0,)), ((0.0,), (1.0, 1.0)), ((float("nan"),), (1.0,))):
        with pytest.raises(ValueError, match="mean, std"):
            FrameStats(mean, std)


def test_the_networks_memory_order_costs_no_copy():
    x = FrameStats((0.0,) * 3, (1.0,) * 3).normalize(np.zeros((2, 5, 4, 6, 3), np.uint8))
    assert x.transpose(1, 2).is_contiguous(memory_format=torch.channels_last_3d)
